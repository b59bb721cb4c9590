"""Timing a runtime's kernels on this machine or on a device, and a profile with their speeds."""

import hashlib
import platform
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import numpy as np

from exporter.bench.engine import LIMIT_S, require_end
from exporter.bench.measurement import Remote, connect, threads_for
from exporter.bench.results import KernelTimes, ProductTimes, parsed
from exporter.bundle.manifest import sha256_of
from exporter.device.backend import TimedKernel
from exporter.device.connect.connection import ignored
from exporter.device.connect.local import Local
from exporter.device.connect.machine import Machine, lacking, read_machine
from exporter.device.connect.remote_folder import PROGRAM, RemoteFolder, Upload, remote_folder
from exporter.device.connect.shell import line
from exporter.device.profile import DeviceProfile, load_device
from exporter.emulate.arm64.core import stand_in
from exporter.emulate.arm64.setup import installation
from exporter.foundation.building import compiled, unpacked_source
from exporter.foundation.cache import cache_folder, scratch_folder
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.config_files import checked
from exporter.foundation.errors import InputError, MissingDependencyError, RequestError
from exporter.foundation.quantities import Basis
from exporter.predict import measured_runs
from exporter.targets.emulated import emulation_needs
from exporter.targets.kernel_program import KernelProgram, kernel_program

SOURCE = "edge-exporter bench --kernels"
# More than processors have caches, but for a few: what is multiplied has to come from memory.
BYTES = 96 << 20
PROMPT = 256
# Emulated cores are some fifty times as slow, and have no caches.
EMULATED_BYTES, EMULATED_PROMPT = 1 << 20, 8
# Times that vary more say more about what else ran.
MOST_SPREAD = 0.15
ARCHITECTURES = {"aarch64": "aarch64", "arm64": "aarch64", "x86_64": "x86_64", "amd64": "x86_64"}


@dataclass(frozen=True)
class KernelBench:
    """The times of a runtime's kernels on a machine.

    Attributes:
        where: The device's address, or this machine.
        machine: Its description of itself.
        program: What timed them.
        times: The times.
        basis: `measured`, or `emulated`: such times are not those of a device.
    """

    where: str
    machine: Machine
    program: KernelProgram
    times: KernelTimes
    basis: Basis = "measured"

    @property
    def speeds(self) -> dict[str, TimedKernel]:
        """Format -> its speed.

        Raises:
            InputError: the times of a format do not grow with its matrices, or one is missing.
        """
        return {format: speed_of(self.times, format, self.where) for format in self.program.formats}

    @property
    def spread(self) -> float:
        """The largest spread of a format's times."""
        return max(speed.spread for speed in self.speeds.values())


def kernels_here(device: str | None, threads: int, rounds: int) -> KernelBench:
    """Time the kernels on this machine; see `kernels_on`."""
    return _kernels(partial(remote_folder, Local, parent=None, keep=False), device, threads, rounds)


def kernels_on(remote: Remote, device: str | None, threads: int, rounds: int) -> KernelBench:
    """Time the kernels on a device.

    Args:
        remote: How it is reached.
        device: Its profile; None to require nothing of it.
        threads: Threads; for 0, the profile or the cores decide.
        rounds: Repeats of each time, after a warm-up.

    Raises:
        RequestError: the device is not one of the profile, has no Linux or Android, or the program failed there.
        MissingDependencyError: there is no compiler for it here.
        InputError: its answer is no answer of the program.
    """
    return _kernels(
        partial(remote_folder, partial(connect, remote), parent=remote.folder, keep=False), device, threads, rounds
    )


def kernels_emulated(device: str | None, threads: int, rounds: int) -> KernelBench:
    """Run the program on the emulated core of a device, which shows that it works there.

    Raises:
        RequestError: the device is not an Arm, or the program failed.
        MissingDependencyError: the emulation is not set up, or there is no compiler.
    """
    if device is None:
        raise RequestError("no device is named", where="--emulated", next_step="name one with --device")
    core, program = stand_in(load_device(device)), kernel_program()
    if core is None:
        raise RequestError("only Arm cores are emulated", got=device, next_step="leave out --emulated")
    emulated = installation(emulation_needs()).machine(core)
    path = built(program, "aarch64", core.features)
    arguments = arguments_of(program, threads or 1, rounds, EMULATED_BYTES, EMULATED_PROMPT)
    where = f"emulated {core.name}"
    times = parsed(KernelTimes, emulated.run([path, *arguments], LIMIT_S), where)
    return KernelBench(where, Machine("Linux", "aarch64", core.name, 0, 0, core.features), program, times, "emulated")


def _kernels(
    folder: Callable[[str], AbstractContextManager[RemoteFolder]], device: str | None, threads: int, rounds: int
) -> KernelBench:
    program = kernel_program()
    profile = None if device is None else load_device(device)
    with folder(f"bench-kernels{hashlib.sha256(program.runtime.encode()).hexdigest()[:8]}") as place:
        machine, where = read_machine(place.connection), place.connection.where
        _require_device(machine, profile, where)
        path = built(program, _architecture(machine, where), machine.features)
        name = f"{PROGRAM}/{path.name}"
        place.fill([Upload(path, name, *sha256_of(path))], ignored)
        place.run(line("chmod 700 %s", name))
        arguments = arguments_of(program, threads_for(threads, machine, device), rounds)
        answer = place.work(line("%s %s", f"{place.path}/{name}", arguments), LIMIT_S)
        require_end(answer, place.connection)
        return KernelBench(where, machine, program, parsed(KernelTimes, answer.output, where))


def arguments_of(
    program: KernelProgram, threads: int, rounds: int, bytes: int = BYTES, prompt: int = PROMPT
) -> list[str]:
    """Return the arguments of a program; see `KernelProgram`."""
    return [*map(str, (threads, rounds, bytes, prompt)), program.reference, *program.formats]


def _require_device(machine: Machine, profile: DeviceProfile | None, where: str) -> None:
    if machine.system != "Linux":
        raise RequestError(
            "kernels are timed on Linux and Android", where=where, got=machine.system,
            next_step="time a bundle there with edge-exporter bench BUNDLE",
        )  # fmt: skip
    missing = [] if profile is None else lacking(profile, machine)
    if profile is not None and missing:
        raise RequestError(
            f"the machine is no {profile.name}", where=where,
            got=f"{machine.architecture} without {', '.join(missing)}", expected=", ".join(profile.isa.features),
            next_step="name the machine's own profile with --device, or the device with --on",
        )  # fmt: skip


def _architecture(machine: Machine, where: str) -> str:
    known = ARCHITECTURES.get(machine.architecture.lower())
    if known is None:
        raise RequestError(
            "no kernels are timed on this architecture", where=where, got=machine.architecture,
            expected=" or ".join(dict.fromkeys(ARCHITECTURES.values())),
        )  # fmt: skip
    return known


def built(program: KernelProgram, architecture: str, features: Collection[str]) -> Path:
    """Return the program for a processor, static, compiled once and kept in the cache.

    Raises:
        MissingDependencyError: a compiler for the architecture is missing.
        RequestError: the source cannot be downloaded, or not compiled.
    """
    settings, path = _settings(program, architecture, features), program_path(program, architecture, features)

    def make(folder: Path) -> None:
        _require_compilers(architecture)
        with scratch_folder() as scratch:
            source = unpacked_source(program.source, program.inside, scratch)
            own = {**settings, program.source_setting: source}
            shutil.copy(compiled(path.name, program.project, scratch / "build", own), folder / path.name)

    kept_folder(path.parent, make)
    return path


def program_path(program: KernelProgram, architecture: str, features: Collection[str]) -> Path:
    """Return the place of the program for a processor in the cache, whether or not it was compiled."""
    contents = repr((program.source, sorted(_settings(program, architecture, features).items()))).encode()
    contents += b"".join(path.read_bytes() for path in sorted(program.project.iterdir()))
    return cache_folder("kernels", hashlib.sha256(contents).hexdigest()[:12]) / program.project.name


def _settings(program: KernelProgram, architecture: str, features: Collection[str]) -> dict[str, str]:
    return {
        "BUILD_SHARED_LIBS": "OFF",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": architecture,
        **{f"CMAKE_{language}_COMPILER": name for language, name in _compilers(architecture).items()},
        **program.settings(architecture, features),
    }


def _compilers(architecture: str) -> dict[str, str]:
    if architecture == ARCHITECTURES.get(platform.machine().lower()):
        return {"C": "gcc", "CXX": "g++"}
    return {"C": f"{architecture}-linux-gnu-gcc", "CXX": f"{architecture}-linux-gnu-g++"}


def _require_compilers(architecture: str) -> None:
    compilers = _compilers(architecture)
    missing = [name for name in ("cmake", *compilers.values()) if shutil.which(name) is None]
    if missing:
        package = compilers["CXX"] if compilers["CXX"] == "g++" else f"g++-{architecture.replace('_', '-')}-linux-gnu"
        raise MissingDependencyError(
            f"no compiler for the program that times kernels on {architecture}", got=f"no {', '.join(missing)}",
            next_step=f"install it: apt-get install {package} cmake",
        )  # fmt: skip


def speed_of(times: KernelTimes, format: str, where: str) -> TimedKernel:
    """Return the speed of a format.

    A time is that of the format with which the others take turns, times the median ratio of a turn: what else happened
    to the processor happened to both. With one token, a product takes a constant and a time for each weight; both are
    fitted to the shapes, with equal weight on relative errors.

    Raises:
        InputError: there are no times of it, or they do not grow with the matrices.
    """
    own = [one for one in times.products if one.type == format]
    single, many = ([one for one in own if (one.tokens > 1) == several] for several in (False, True))
    if len(many) != 1 or len({one.weights for one in single}) < 2:
        raise InputError(
            f"the program did not time {format}", where=where, got=f"{len(single)} shapes with one token",
            expected="two or more, and one with many", next_step="check what runs there under that name",
        )  # fmt: skip
    seconds = np.array([_seconds(times, one) for one in single])
    weights = np.array([one.weights for one in single], np.float64)
    terms = np.stack([1 / seconds, weights / seconds], axis=1)
    constant, per_weight = np.linalg.lstsq(terms, np.ones(len(single)), rcond=None)[0]
    if constant < 0:
        share = weights / seconds
        constant, per_weight = 0.0, share.sum() / (share @ share)
    if not per_weight > 0:
        raise InputError(
            f"the times of {format} do not grow with its matrices", where=where,
            got=", ".join(f"{1e6 * one:.3g} µs" for one in seconds),
            next_step="end what else runs there, and time it again",
        )  # fmt: skip
    return checked(
        {
            "bits": 8 * many[0].row_bytes / many[0].columns,
            "decode_weights_per_s": float(1 / per_weight),
            "product_seconds": float(constant),
            "prefill_weights_per_s": many[0].weights * many[0].tokens / _seconds(times, many[0]),
            "spread": max(map(_spread, own)),
        },
        TimedKernel,
        f"{where}: {format}",
    )


def _seconds(times: KernelTimes, one: ProductTimes) -> float:
    """Return what a product of a format takes when the machine is as it was in the median of all turns of its shape."""
    reference = [ns for other in times.products if other.shape == one.shape for ns in other.reference_ns]
    ratio = median(own / other for own, other in zip(one.ns, one.reference_ns, strict=True))
    return 1e-9 * median(reference) * ratio


def _spread(one: ProductTimes) -> float:
    if len(one.ns) < 2:
        return 0.0
    low, middle, high = quantiles(one.ns, n=4, method="inclusive")
    return (high - low) / 2 / middle


def require_measured(basis: Basis) -> None:
    """Refuse to write times into a profile that are not the device's.

    Raises:
        RequestError: they are of another basis than `measured`.
    """
    if basis != "measured":
        raise RequestError(
            "the speeds of an emulation are not those of a device", got=basis,
            next_step="time the kernels on the device with --on, or leave out --profile",
        )  # fmt: skip


def write_profile(found: KernelBench, device: str, path: Path) -> None:
    """Write a device's profile with the kernel speeds, in place of earlier ones of the same target.

    Args:
        found: The times.
        device: The profile to start from.
        path: The new file; its name without `.toml` becomes the device's name.

    Raises:
        RequestError: the file cannot be a new one, or the times are those of an emulation.
        InputError: the times cannot have been measured on this device.
    """
    require_measured(found.basis)
    profile = load_device(device)
    machine, program = found.machine, found.program
    timed = {
        "target": program.target,
        "runtime": program.runtime,
        "threads": found.times.threads,
        "basis": "measured",
        "source": f"{SOURCE}, {found.times.time}, {machine.cpu or machine.architecture}",
        "speeds": {format: speed.model_dump() for format, speed in found.speeds.items()},
    }
    table = profile.model_dump()
    for backend in table["backends"]:
        if backend["name"] == "cpu":
            others = [one for one in backend["timed_kernels"] if one["target"] != program.target]
            backend["timed_kernels"] = [*others, timed]
    measured_runs.write_profile(checked(table | {"name": path.stem}, DeviceProfile, path), path)
