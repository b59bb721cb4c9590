"""Runs an artifact on the build machine under a device's limits: the stage that `--emulate` adds."""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from exporter.child.network import cut_network
from exporter.child.process import Child
from exporter.child.serve import cpu_seconds
from exporter.device.profile import DeviceProfile
from exporter.emulate.sandbox.cgroup import LONGEST_PERIOD_US, control_groups
from exporter.emulate.sandbox.confined import Confinement, confined, controlled, hindrance
from exporter.emulate.sandbox.limits import ProcessLimits, device_limits
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import ExporterError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check, Quantity, Status
from exporter.prove.prompt import DECODE_TOKENS, prompt_for
from exporter.targets.artifact import Artifact, runtime_of
from exporter.targets.opened import memory_bytes
from exporter.targets.runtime import Runtime, Timing

if TYPE_CHECKING:  # it imports transformers, which a run does not need
    from exporter.calibrate.windows import Tokens

NAMES = ("emulation.run", "emulation.memory", "emulation.cpu", "emulation.network")
# Whether these can be run depends on the other load of the machine.
NEVER_FAILING = frozenset({"emulation.cpu", "emulation.network"})
# Beyond one period, since a run may begin and end in the middle of one.
SHARE_TOLERANCE = 0.15
# Beyond the time limit of a run, after which it is killed in any case.
SLACK_S = 60.0


@dataclass(frozen=True)
class Emulation:
    """Checks and numbers of an emulated run; every number's basis is `emulated`.

    Attributes:
        checks: Outcomes; a check that this machine cannot emulate is `not run`.
        quantities: Name -> number, such as `peak_bytes`.
        notes: Sentences on what was changed in the artifact.
    """

    checks: tuple[Check, ...] = ()
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __add__(self, other: Self) -> "Emulation":
        """Return the checks, numbers and notes of both."""
        quantities = {**self.quantities, **other.quantities}
        return Emulation(self.checks + other.checks, quantities, self.notes + other.notes)


def emulate(
    artifact: Artifact,
    device: DeviceProfile,
    tokens: "Tokens",
    context: int,
    progress: Progress = silent,
    limits: ProcessLimits | None = None,
) -> Emulation:
    """Run an artifact on this machine under a device's limits.

    Args:
        artifact: The artifact; its files are not changed.
        device: The device.
        tokens: Text to run it on, int64 [windows, length].
        context: Tokens of context to run at.
        progress: Called with the name of the step, steps done and their total.
        limits: Limits in place of the device's.
    """
    return run_within(artifact, limits or device_limits(device, artifact.file_bytes), tokens, context, progress)


@contextmanager
def confined_child(
    title: str, memory_bytes: int, limits: ProcessLimits, files: Collection[Path] = ()
) -> Iterator[tuple[Child, Confinement]]:
    """Start a child process under a device's limits.

    Args:
        title: Name of the runtime, for messages.
        memory_bytes: Most memory that it may allocate; see `Child`.
        limits: The limits.
        files: Files whose pages count in full, even if other processes map them.
    """
    with (
        control_groups(controlled(limits)) as groups,
        Child(title, memory_bytes) as child,
        confined(child.process_id, limits, groups, files) as confinement,
    ):
        yield child, confinement


@dataclass(frozen=True)
class EmulationRun:
    """A completed run.

    Attributes:
        timing: Timing of the runtime on this machine.
        wall_s: Seconds of the timed part.
        cpu_s: CPU seconds of the timed part, over all threads.
        network_methods: How the network was disabled; empty if it was not.
    """

    timing: Timing
    wall_s: float
    cpu_s: float
    network_methods: tuple[str, ...]


def run_within(
    artifact: Artifact, limits: ProcessLimits, tokens: "Tokens", context: int, progress: Progress = silent
) -> Emulation:
    """Read a prompt that fills the context and generate tokens, under limits and without a network."""
    reason = hindrance()
    if reason is not None:
        return Emulation(tuple(Check(name=name, status="not run", detail=reason) for name in NAMES))
    prompt = prompt_for(tokens, context)
    progress("emulate: limits", 0, 1)
    title, most_bytes = runtime_of(artifact.target).title, memory_bytes(artifact, context)
    with confined_child(title, most_bytes, limits, artifact.weights) as (child, confinement):
        try:
            run = _run(child, artifact, limits, prompt, context)
            failure = ""
        except RuntimeCrashError as error:
            run = None
            failure = _failure(confinement, error)
        paged = confinement.paged_bytes
    progress("emulate: limits", 1, 1)
    checks = (
        _check_run(run, failure, limits, len(prompt)),
        _check_memory(run, confinement, paged, artifact.file_bytes),
        _check_cpu(run, confinement),
        _check_network(run),
    )
    return Emulation(checks, _quantities(run, confinement))


def _run(child: Child, artifact: Artifact, limits: ProcessLimits, prompt: list[int], context: int) -> EmulationRun:
    seconds = limits.timeout_s + SLACK_S
    child.make(runtime_of(artifact.target), seconds, artifact, context, limits.usable_cores, False, 1)
    child.ready()
    methods = child.run(cut_network, seconds)
    started, used = time.perf_counter(), child.run(cpu_seconds, seconds)
    timing = child.call(Runtime.measure, seconds, prompt, DECODE_TOKENS, 1)
    return EmulationRun(timing, time.perf_counter() - started, child.run(cpu_seconds, seconds) - used, tuple(methods))


def _failure(confinement: Confinement, error: RuntimeCrashError) -> str:
    if confinement.out_of_memory:
        return "it was ended for want of memory"
    if confinement.watch.ended == "time":
        return f"it had not ended after {confinement.limits.timeout_s:g} s and was stopped"
    return str(error).removesuffix(".")


def _check_run(run: EmulationRun | None, failure: str, limits: ProcessLimits, prompt: int) -> Check:
    done = f"a prompt of {prompt} tokens read and {DECODE_TOKENS} generated within {limits.timeout_s:g} s"
    return outcome("emulation.run", "passed" if run else "failed", done if run else failure)


def _check_memory(run: EmulationRun | None, confinement: Confinement, paged: int, file_bytes: int) -> Check:
    limit, peak = confinement.limits.memory_bytes, confinement.watch.peak_bytes
    name, by = "emulation.memory", f"by {confinement.memory_method}"
    if limit is None:
        return outcome(name, "not run", "no limit was asked for")
    if confinement.out_of_memory:
        detail = f"more than the {_size(limit)} that one app may hold; ended {by}"
        return outcome(name, "failed", detail, max(peak, limit), limit, "bytes")
    if paged > file_bytes:
        detail = f"{_size(paged)} of files were read again and again for want of memory, {by}"
        return outcome(name, "failed", detail, peak, limit, "bytes")
    if run is None:
        return outcome(name, "not run", f"the run did not come to its end; {_size(peak)} were held until then, {by}")
    if not peak:
        return outcome(name, "not run", "the system does not let the process's proportional set be read")
    detail = f"peak memory {_size(peak)} (emulated) under a limit of {_size(limit)} {by}"
    return outcome(name, "passed", detail, peak, limit, "bytes")


def _check_cpu(run: EmulationRun | None, confinement: Confinement) -> Check:
    limits, name = confinement.limits, "emulation.cpu"
    if run is None:
        return outcome(name, "not run", "the run did not come to its end")
    most, used = limits.cpu_share * limits.usable_cores, run.cpu_s / run.wall_s
    cores = f"{limits.usable_cores} core{'s' if limits.usable_cores > 1 else ''}"
    if limits.cores is not None and limits.cores > available_cores():
        cores += f" of {limits.cores}, for this machine has no more"
    detail = f"{used:.2f} CPU seconds a second on {cores}, share {limits.cpu_share:g}, by {confinement.cpu_method}"
    if run.cpu_s > most * (1 + SHARE_TOLERANCE) * (run.wall_s + LONGEST_PERIOD_US / 1e6):
        return outcome(name, "not run", f"the limit was not kept: {detail}")
    return outcome(name, "passed", detail)


def _check_network(run: EmulationRun | None) -> Check:
    name = "emulation.network"
    if run is None:
        return outcome(name, "not run", "the run did not come to its end")
    if not run.network_methods:
        return outcome(name, "not run", "neither a network namespace nor seccomp is to be had here")
    return outcome(name, "passed", f"it ran without a network, by {' and '.join(run.network_methods)}")


def _quantities(run: EmulationRun | None, confinement: Confinement) -> dict[str, Quantity]:
    values = {"peak_bytes": (float(confinement.watch.peak_bytes), "bytes")}
    if run is not None:
        values |= {
            "host_prefill_tokens_per_s": (run.timing.prefill_tokens_per_s, "tokens/s"),
            "host_decode_tokens_per_s": (run.timing.decode_tokens_per_s, "tokens/s"),
            "host_cpu_s": (run.cpu_s, "s"),
            "host_wall_s": (run.wall_s, "s"),
        }
    return {name: Quantity(value=value, unit=unit, basis="emulated") for name, (value, unit) in values.items()}


def outcome(
    name: str, status: Status, detail: str, value: float | None = None, limit: float | None = None, unit: str = ""
) -> Check:
    """Return a check."""
    return Check(name=name, status=status, detail=detail, value=value, limit=limit, unit=unit)


def not_run(names: Iterable[str], reason: str) -> Emulation:
    """Return the checks of what was not run."""
    return Emulation(tuple(outcome(name, "not run", reason) for name in names))


def words(error: ExporterError) -> str:
    """Return an error's sentence as a part of another."""
    return str(error).removesuffix(".")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
