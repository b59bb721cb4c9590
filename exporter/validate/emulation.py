"""What an artifact does on the build machine under a device's limits: the stage that `--emulate` adds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from exporter.calibrate.text import Tokens
from exporter.confinement.limits import Limits, device_limits
from exporter.device.profile import DeviceProfile
from exporter.job import Progress, silent
from exporter.measures import Check, Quantity
from exporter.targets.artifact import Artifact


@dataclass(frozen=True)
class Emulation:
    """Checks and numbers of an emulated run; every number's basis is `emulated`.

    Attributes:
        checks: Outcomes; what this machine cannot emulate is `not run`.
        quantities: Name -> number, such as `peak_bytes`.
    """

    checks: tuple[Check, ...] = ()
    quantities: Mapping[str, Quantity] = field(default_factory=dict)

    def __add__(self, other: Self) -> "Emulation":
        """Return both, one after the other."""
        return Emulation(self.checks + other.checks, {**self.quantities, **other.quantities})


def emulate(
    artifact: Artifact,
    device: DeviceProfile,
    tokens: Tokens,
    context: int,
    progress: Progress = silent,
    limits: Limits | None = None,
) -> Emulation:
    """Run an artifact as on a device, on this machine: each kind of emulation is one term of the sum.

    Args:
        artifact: What to run; its files are not changed.
        device: The device.
        tokens: Text to run it on, int64 [windows, length].
        context: Tokens of context to run at.
        progress: Called with what is done, steps done and their total.
        limits: The limits in place of the device's.
    """
    return run_within(artifact, limits or device_limits(device), tokens, context, progress)


def run_within(
    artifact: Artifact, limits: Limits, tokens: Tokens, context: int, progress: Progress = silent
) -> Emulation:
    """Read a prompt and generate under limits; see `emulate`."""
    raise NotImplementedError
