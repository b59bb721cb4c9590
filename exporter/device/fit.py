"""Checks whether an artifact fits a device: its file and peak memory against RAM and the limit of one app."""

import math

from exporter.device.profile import DeviceClass, DeviceProfile
from exporter.device.provenance import Fact
from exporter.foundation.errors import ExporterError
from exporter.foundation.quantities import Basis, Check, Quantity

UNIT = "bytes"
FILE_SIZE = "device.file_size"
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# A Raspberry Pi 5 pages its weights once they come within 0.3 to 0.5 GB of its RAM (nyunai/edge-llm-leaderboard).
# The largest observed app on an 8 GB iPhone left 2 GB (introlab/rtabmap pull request 1446). The same value is assumed
# for other phones, tablets and laptops.
OS_RESERVE_BYTES: dict[DeviceClass, float] = {"phone": 2e9, "tablet": 2e9, "laptop": 2e9, "board": 0.5e9}
LARGEST_RESERVED_SHARE = 0.5


def check_fit(
    profile: DeviceProfile, file_bytes: int, peak_memory: Quantity, file_basis: Basis = "measured"
) -> list[Check]:
    """Compare an artifact with the memory of a device.

    Args:
        profile: The device.
        file_bytes: Size of the model's files.
        peak_memory: Peak memory of the runtime with the artifact, including weights, in bytes.
        file_basis: Basis of the file size: `estimated` before the file is written.

    Returns:
        The checks `device.app_memory`, `device.ram` and `device.file_size`, in bytes.

    Raises:
        ExporterError: the file or the peak memory is not a positive number of bytes.
    """
    if peak_memory.unit != UNIT or peak_memory.value <= 0 or file_bytes <= 0:
        raise ExporterError(
            "the sizes of an artifact are not positive numbers of bytes",
            where=f"device {profile.name}",
            got=f"a file of {file_bytes} bytes and a peak memory of {peak_memory.value:g} {peak_memory.unit}",
            expected="bytes above zero",
        )
    return [_app_memory(profile, peak_memory), _ram(profile, peak_memory), _file_size(profile, file_bytes, file_basis)]


def _app_memory(profile: DeviceProfile, peak: Quantity) -> Check:
    limit, wider = profile.app_memory_limit_bytes, profile.app_memory_limit_with_entitlement_bytes
    advice = ""
    if wider is not None and peak.value <= wider.value:
        advice = f"; it fits an app with the entitlement for more memory, {_known(wider)}"
    rule = f"what one app may use, {_known(limit)}"
    return _check("device.app_memory", f"peak memory {_known(peak)}", peak.value, rule, limit.value, advice)


def _ram(profile: DeviceProfile, peak: Quantity) -> Check:
    ram, reserve = profile.ram_bytes, reserved_bytes(profile)
    limit = ram.value - reserve
    rule = f"{_size(limit)}: RAM of {_known(ram)} less {_size(reserve)} for the system (estimated)"
    return _check("device.ram", f"peak memory {_known(peak)}", peak.value, rule, limit)


def reserved_bytes(profile: DeviceProfile) -> float:
    """Return the RAM assumed to be reserved for the system."""
    return min(OS_RESERVE_BYTES[profile.device_class], LARGEST_RESERVED_SHARE * profile.ram_bytes.value)


def _file_size(profile: DeviceProfile, file_bytes: int, basis: Basis) -> Check:
    limit, storage = profile.app_memory_limit_bytes, profile.storage_read_bytes_per_s
    advice = "; a mapped file must stay in memory to be fast"
    if storage is not None:
        advice += f", or each token reads the rest from storage at {storage.value / 1e6:,.0f} MB/s ({storage.basis})"
    rule = f"what one app may use, {_known(limit)}"
    # A file as large as the limit leaves no room for the cache and the buffers.
    most = math.ceil(limit.value) - 1
    return _check(FILE_SIZE, f"a model of {_size(file_bytes)} ({basis})", file_bytes, rule, most, advice)


def _check(name: str, what: str, value: float, rule: str, limit: float, advice: str = "") -> Check:
    """Compare two numbers of bytes; `advice` is appended if the value does not fit."""
    fits = value <= limit
    detail = f"{what} is within {rule}" if fits else f"{what} exceeds {rule}, by {_size(value - limit)}{advice}"
    return Check(
        name=name,
        status="passed" if fits else "failed",
        detail=detail,
        value=float(value),
        limit=limit,
        unit=UNIT,
    )


def _known(number: Quantity | Fact) -> str:
    return f"{_size(number.value)} ({number.basis})"


def _size(size_bytes: float) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:,.2f} {name}"
    return f"{size_bytes:,.0f} bytes"
