"""Kernel speeds as data: one TOML file for each instruction set, in the folder `kernel_speeds` of a target."""

from collections.abc import Collection, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import Field

from exporter.device.provenance import Text
from exporter.foundation.config_files import read_document
from exporter.foundation.quantities import Basis, Document
from exporter.predict.roofline import Throughput

FOLDER = "kernel_speeds"
Ratio = Annotated[float, Field(gt=0, le=10)]


class RelativeSpeed(Document):
    """Multiply-adds per second with one token and with many, relative to the file's unit."""

    decode: Ratio
    prefill: Ratio


class KernelSpeeds(Document):
    """The speeds of a runtime's kernels on one instruction set.

    Attributes:
        order: Files are tried in this order.
        features: The file is for processors with one of these; empty: for all that are left.
        basis: How the speeds are known.
        source: What they were measured or published on.
        command: The command that measures them.
        date: When they were.
        unit: What a speed of 1 is, relative to llama.cpp's Q4_0 with many tokens.
        speeds: Format -> speed.
    """

    schema_version: Literal[1]
    order: int
    features: tuple[Text, ...] = Field(strict=False)
    basis: Basis
    source: Text
    command: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    unit: RelativeSpeed = RelativeSpeed(decode=1.0, prefill=1.0)
    speeds: dict[str, RelativeSpeed]

    def throughputs(self) -> dict[str, Throughput]:
        """Return format -> speed, relative to llama.cpp's Q4_0 with many tokens."""
        unit = Throughput(self.unit.decode, self.unit.prefill)
        return {name: Throughput(one.decode, one.prefill).times(unit) for name, one in self.speeds.items()}


@cache
def speed_files(package: str) -> tuple[KernelSpeeds, ...]:
    """Return the files of a target's package, in their order."""
    found = (path for path in (files(package) / FOLDER).iterdir() if path.name.endswith(".toml"))
    read = [read_document(path, KernelSpeeds, "file of kernel speeds") for path in found]
    return tuple(sorted(read, key=lambda one: one.order))


def speeds_on(package: str, features: Collection[str]) -> Mapping[str, Throughput]:
    """Return format -> speed on a processor.

    Args:
        package: The target's, such as `exporter.targets.gguf`.
        features: The processor's, named as in device profiles.
    """
    return next(
        one.throughputs() for one in speed_files(package) if not one.features or set(one.features) & set(features)
    )
