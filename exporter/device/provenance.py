"""Facts about a device: numbers with basis and source, bounds checks, and suggestions for the likely unit."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from exporter.foundation.config_files import impossible, shown
from exporter.foundation.quantities import Basis, Document

MAX_TEXT = 1000
MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
GB = 1_000_000_000
# Memory modules are whole multiples of this, so a round number of GB is not a valid size.
MODULE = 64 * MIB

SIZE_UNITS = {"GiB": GIB, "MiB": MIB, "KiB": 1 << 10}
RATE_UNITS = {"GB/s": 1e9, "MB/s": 1e6, "kB/s": 1e3}
STORAGE_UNITS = {"MB/s": 1e6, "GB/s": 1e9, "kB/s": 1e3}
OPERATION_UNITS = {"TOPS": 1e12, "GOPS": 1e9}
CLOCK_UNITS = {"MHz": 1e-3, "Hz": 1e-9}
TIME_UNITS = {"milliseconds": 1e-3, "microseconds": 1e-6}


def _readable(text: str) -> str:
    # Control characters would reach terminals and reports.
    if not text.strip() or len(text) > MAX_TEXT or not text.isprintable():
        raise impossible("the text cannot be shown", shown(text), f"1 to {MAX_TEXT} printable characters on one line")
    return text


Text = Annotated[str, AfterValidator(_readable)]


class Fact(Document):
    """A number about a device, in the unit that its key names.

    Attributes:
        value: The number.
        basis: `published` if it was read, or calculated from numbers read, about this device; `estimated` if any part
            is recalled, planned or transferred from a related device.
        source: Its source, and how it follows from there.
    """

    value: float
    basis: Basis
    source: Text


class Sizes(Document):
    """The memory sizes that a device is sold with, in bytes, smallest first."""

    values: tuple[float, ...] = Field(strict=False, min_length=1, max_length=32)
    basis: Basis
    source: Text


def _within(low: float, high: float, words: str, units: Mapping[str, float] | None = None) -> AfterValidator:
    """Return a bounds check; its message names one of the other `units` if the number fits in it."""

    def check(fact: Fact) -> Fact:
        value = fact.value
        if not low <= value <= high:
            meant = ((name, value * size) for name, size in (units or {}).items() if low <= value * size <= high)
            advice = next((f"if it is in {name}, write {number:_.13g}" for name, number in meant), None)
            raise impossible("the number is impossible", f"{value:,.13g}", words, advice)
        return fact

    return AfterValidator(check)


def require_whole_modules(value: float) -> None:
    """Reject round numbers of GB, since memory is sold by the GiB.

    Raises:
        PydanticCustomError: the value is a round number of GB.
    """
    if value % MODULE and value % (GB // 10) == 0:
        advice = f"if it is {value / GB:g} GiB, write {round(value / GB * GIB):_}"
        raise impossible("this is GB, and memory is sold in GiB", f"{value:,.13g}", "installed memory in bytes", advice)


def _modules(fact: Fact) -> Fact:
    require_whole_modules(fact.value)
    return fact


def _sold(sizes: Sizes) -> Sizes:
    for value in sizes.values:
        if not MODULE <= value <= TIB:
            raise impossible("a size is impossible", f"{value:,.13g}", "64 MiB to 1 TiB, in bytes")
        require_whole_modules(value)
    if list(sizes.values) != sorted(set(sizes.values)):
        raise impossible("the sizes are not in order", "a larger or equal size first", "each once, the smallest first")
    return sizes


Clock = Annotated[Fact, _within(0.1, 7, "0.1 to 7 GHz", CLOCK_UNITS)]
Ram = Annotated[Fact, _within(64 * MIB, TIB, "64 MiB to 1 TiB, in bytes", SIZE_UNITS), AfterValidator(_modules)]
RamOptions = Annotated[Sizes, AfterValidator(_sold)]
AppMemory = Annotated[Fact, _within(32 * MIB, TIB, "32 MiB to 1 TiB, in bytes", SIZE_UNITS)]
Bandwidth = Annotated[Fact, _within(0.5e9, 5e12, "0.5e9 to 5e12 bytes/s", RATE_UNITS)]
StorageRead = Annotated[Fact, _within(1e7, 1e11, "1e7 to 1e11 bytes/s", STORAGE_UNITS)]
Operations = Annotated[Fact, _within(1e8, 1e16, "1e8 to 1e16 operations/s", OPERATION_UNITS)]
Seconds = Annotated[Fact, _within(0, 1, "0 to 1 seconds", TIME_UNITS)]
Watts = Annotated[Fact, _within(0.1, 2000, "0.1 to 2,000 watts", {"milliwatts": 1e-3})]
Share = Annotated[Fact, _within(0.05, 1, "a share from 0.05 to 1", {"percent": 1e-2})]
Ratio = Annotated[Fact, _within(0.05, 2, "a ratio from 0.05 to 2", {"percent": 1e-2})]
