"""Chooses the emulated core for a device: the one with the most features, none of which the device lacks."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from exporter.device.backend import ArmFeature
from exporter.device.profile import DeviceProfile

# Features of the profiles that select other kernels in ONNX Runtime or llama.cpp. Profiles say less about the rest,
# such as bf16: neither runtime uses it by default.
CHOOSING = frozenset[str]({"dotprod", "i8mm", "sve2", "sme"})

# The kernel's names in /proc/cpuinfo: features of every ARMv8.0 core, and those that come with the features above.
BASIC = ("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "cpuid")
V82 = ("atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "dcpop")


@dataclass(frozen=True)
class Core:
    """A kind of core that QEMU 7.2 emulates in user mode.

    Attributes:
        name: Name in reports.
        model: QEMU's `-cpu`.
        part: Its number in the main identification register, by which libraries know the microarchitecture.
        features: The features of profiles that select kernels and that it has.
        flags: The kernel's names of its features.
        march: The compilers' name of its instruction set.
    """

    name: str
    model: str
    part: int
    features: frozenset[str]
    flags: tuple[str, ...]
    march: str

    def cpuinfo(self, count: int) -> str:
        """Return the text of /proc/cpuinfo for so many of these cores (Arm Ltd. is implementer 0x41)."""
        lines = (
            "BogoMIPS\t: 100.00",
            f"Features\t: {' '.join(self.flags)}",
            "CPU implementer\t: 0x41",
            "CPU architecture: 8",
            "CPU variant\t: 0x0",
            f"CPU part\t: {self.part:#05x}",
            "CPU revision\t: 1",
        )
        return "".join("\n".join((f"processor\t: {number}", *lines, "", "")) for number in range(count))


CORTEX_A72 = Core("Cortex-A72", "cortex-a72", 0xD08, frozenset(), BASIC, "armv8-a")
CORTEX_A76 = Core(
    "Cortex-A76",
    "cortex-a76",
    0xD0B,
    frozenset({"dotprod"}),
    (*BASIC, *V82, "asimddp"),
    "armv8.2-a+dotprod",
)
# QEMU 7.2's only core with i8mm is its own, which has every feature; unwanted features are disabled. The part is that
# of a Cortex-A715.
WITH_I8MM = Core(
    "Armv8.6 core with i8mm",
    "max,sve=off,sme=off",
    0xD4D,
    frozenset({"dotprod", "i8mm"}),
    (*CORTEX_A76.flags, "i8mm", "bf16"),
    "armv8.2-a+dotprod+i8mm",
)
CORES = (CORTEX_A72, CORTEX_A76, WITH_I8MM)


def stand_in(device: DeviceProfile) -> Core | None:
    """Return the emulated core for a device; None if the device is not an Arm."""
    features = set(device.isa.features)
    return core_with(features) if features & set(get_args(ArmFeature)) else None


def core_with(features: Collection[str]) -> Core:
    """Return the core with the most of an Arm's features and with none beside them."""
    return max((core for core in CORES if core.features <= set(features)), key=lambda core: len(core.features))


def lacked(core: Core, device: DeviceProfile) -> tuple[str, ...]:
    """Return the features of a device that select kernels and that its emulated core lacks, sorted."""
    return tuple(sorted((CHOOSING & set(device.isa.features)) - core.features))
