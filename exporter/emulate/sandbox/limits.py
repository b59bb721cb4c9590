"""The limits of one process on a device."""

from dataclasses import dataclass

from exporter.device.profile import DeviceProfile
from exporter.device.provenance import MIB, TIB
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import RequestError

TIMEOUT_S = 300.0
# A run reads the model some 40 times; a few tokens/s of a large model are slow, not stuck.
TIMED_BYTES_PER_S = 5e6
LEAST_SHARE = 0.01


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of one process; `None` for no limit.

    Attributes:
        memory_bytes: Most memory that it may hold.
        cores: Cores that it may run on, capped by those of this machine.
        cpu_share: Share of the time of these cores that it may use, above 0, at most 1.
        timeout_s: Seconds after which it is killed. Always set: a mapped file that does not fit is read again and again
            rather than refused.

    Raises:
        RequestError: a number is impossible.
    """

    memory_bytes: int | None = None
    cores: int | None = None
    cpu_share: float = 1.0
    timeout_s: float = TIMEOUT_S

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        _require("memory limit", self.memory_bytes, MIB, TIB, "bytes")
        _require("number of cores", self.cores, 1, 256, "cores")
        _require("share of the CPU", self.cpu_share, LEAST_SHARE, 1, "of its time")
        _require("timeout", self.timeout_s, 1, 86400, "seconds")

    @property
    def usable_cores(self) -> int:
        """Number of these cores that this machine has."""
        present = available_cores()
        return present if self.cores is None else min(self.cores, present)


def device_limits(device: DeviceProfile, file_bytes: int) -> ProcessLimits:
    """Return the limits of one app on a device: its memory limit, all cores, and time for a model of some bytes."""
    timeout_s = TIMEOUT_S + file_bytes / TIMED_BYTES_PER_S
    return ProcessLimits(memory_bytes=int(device.app_memory_limit_bytes.value), cores=device.cores, timeout_s=timeout_s)


def _require(what: str, value: float | None, low: float, high: float, unit: str) -> None:
    if value is not None and not low <= value <= high:
        raise RequestError(
            f"the {what} is impossible", got=f"{value:,.13g}", expected=f"{low:,.13g} to {high:,.13g} {unit}"
        )
