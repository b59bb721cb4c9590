"""Reads a machine's identity and temperature with shell commands that every Linux and Android has."""

import re
from dataclasses import dataclass
from typing import get_args

from exporter.device.backend import ArmFeature, features_named
from exporter.device.connect.connection import Connection
from exporter.device.connect.shell import Line
from exporter.device.profile import DeviceProfile
from exporter.foundation.errors import RequestError

MAX_NAME = 120
FACTS = Line(
    "uname -s; uname -m; getprop ro.product.model 2>/dev/null || echo; "
    "cat /proc/meminfo /proc/cpuinfo 2>/dev/null; true"
)
WARMTH = Line(
    "for z in /sys/class/thermal/thermal_zone*; do cat $z/type $z/temp 2>/dev/null | paste -s -d ' ' -; done; "
    "dumpsys thermalservice 2>/dev/null || true"
)
COLDEST, HOTTEST = 0.0, 150.0
# Sensors of the processor. Batteries and chargers warm up too, but long after it.
CORES = re.compile(r"cpu|soc|pkg|core|tdie|big|little|mid|cluster|apc", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """The identity of a machine; unknown texts are empty and unknown numbers zero.

    Attributes:
        system: `uname -s`.
        architecture: `uname -m`.
        cpu: Its processor, or the model of a phone.
        cores: Logical processors.
        ram_bytes: Memory visible to the system.
        features: Instructions that all its cores have, under the profiles' names.
    """

    system: str
    architecture: str
    cpu: str
    cores: int
    ram_bytes: int
    features: frozenset[str]


def read_machine(connection: Connection) -> Machine:
    """Read the identity of a device.

    Raises:
        RequestError: it runs no POSIX shell.
    """
    answer = connection.run(FACTS, timeout_s=30)
    if answer.code or answer.output.count("\n") < 3:
        raise RequestError(
            "the device does not say what it is", where=connection.where, got=answer.last_words,
            expected="a shell with uname, as Linux, Android and macOS have",
        )  # fmt: skip
    return machine_of(answer.output)


def machine_of(text: str) -> Machine:
    """Parse the output of `FACTS`."""
    system, architecture, model, *rest = text.splitlines()
    values: dict[str, list[str]] = {}
    for line in rest:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), []).append(value.strip())
    names = [model, *values.get("model name", []), *values.get("Model", []), *values.get("Hardware", [])]
    features = [features_named(line.split()) for line in values.get("Features", []) + values.get("flags", [])]
    return Machine(
        system=_name(system),
        architecture=_name(architecture),
        cpu=next(filter(None, map(_name, names)), ""),
        cores=len(values.get("processor", [])),
        ram_bytes=_ram(values.get("MemTotal", [""])[0]),
        features=frozenset.intersection(*features) if features else frozenset(),
    )


def _ram(text: str) -> int:
    found = re.fullmatch(r"(\d{1,12}) kB", text)
    return int(found[1]) * 1024 if found else 0


def _name(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:MAX_NAME].strip()


def lacking(profile: DeviceProfile, machine: Machine) -> list[str]:
    """Return the features of a profile that a machine lacks; empty if the machine's are unknown."""
    if not machine.features:
        return []
    return sorted(set(profile.isa.features) - machine.features)


def is_of_one_architecture(profile: DeviceProfile, machine: Machine) -> bool:
    """Return whether profile and machine are both Arm or both x86."""
    arm = bool(set(profile.isa.features) & set(get_args(ArmFeature)))
    return machine.architecture.lower().startswith(("arm", "aarch64")) == arm


def read_celsius(connection: Connection) -> float | None:
    """Return the highest temperature of a device's processor, or None if it cannot be read."""
    return celsius_of(connection.run(WARMTH, timeout_s=30).output)


def celsius_of(text: str) -> float | None:
    """Return the highest processor temperature in the output of `WARMTH`; sysfs gives thousandths of a degree."""
    zones = re.findall(r"^(\S{1,60}) (-?\d{1,7})$", text, re.MULTILINE)
    found = [int(value) / 1000 for name, value in zones if CORES.search(name)]
    if not found:
        service = re.findall(r"mValue=(-?\d{1,4}(?:\.\d+)?), mType=\d+, mName=([^,}\s]{1,60})", text)
        found = [float(value) for value, name in service if CORES.search(name)]
    possible = [value for value in found if COLDEST < value < HOTTEST]
    return max(possible, default=None)
