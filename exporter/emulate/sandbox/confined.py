"""A child process under a device's limits: held to them, and looked at from outside."""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.emulate.sandbox.cgroup import ControlGroup, Controller
from exporter.emulate.sandbox.limits import ProcessLimits
from exporter.emulate.sandbox.watch import DutyCycle, Watch


@dataclass(frozen=True)
class Confinement:
    """Limits that a process is held to.

    Attributes:
        limits: The limits.
        watch: What looks at it.
        groups: Control groups it is in, by what they limit.
    """

    limits: ProcessLimits
    watch: Watch
    groups: dict[Controller, ControlGroup]

    @property
    def out_of_memory(self) -> bool:
        """Whether the process was ended because it needed more memory."""
        return self.watch.ended == "memory" or ("memory" in self.groups and self.groups["memory"].killed)

    @property
    def paged_bytes(self) -> int:
        """Bytes of files that it read again for want of memory, as far as a control group tells."""
        return self.groups["memory"].paged_bytes if "memory" in self.groups else 0

    @property
    def memory_method(self) -> str:
        """How the memory was limited."""
        watched = "a watcher of the proportional set every 20 ms"
        return f"{_named(self.groups['memory'])} and {watched}" if "memory" in self.groups else watched

    @property
    def cpu_method(self) -> str:
        """How cores and CPU share were limited."""
        share = "" if self.limits.cpu_share == 1 else ", SIGSTOP and SIGCONT by turns"
        if "cpu" in self.groups:
            share = f", the quota of {_named(self.groups['cpu'])}"
        return "CPU affinity" + share


def _named(group: ControlGroup) -> str:
    return f"a control group (v{group.version})"


def controlled(limits: ProcessLimits) -> dict[Controller, float]:
    """Return what control groups are to limit: bytes of memory, and cores where only a share of them may be used."""
    wanted: dict[Controller, float] = {}
    if limits.memory_bytes is not None:
        wanted["memory"] = limits.memory_bytes
    if limits.cpu_share < 1:
        wanted["cpu"] = limits.cpu_share * limits.usable_cores
    return wanted


def hindrance() -> str | None:
    """Return why no process can be held to limits here; None where one can."""
    if sys.platform != "linux":
        return "only Linux is supported"
    if not Path("/proc/self/smaps_rollup").exists():
        return "the kernel does not tell proportional sets (/proc/PID/smaps_rollup)"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"the system has no pidfd_open: {error.strerror}"
    return None


@contextmanager
def confined(
    process_id: int, limits: ProcessLimits, groups: dict[Controller, ControlGroup], files: Collection[Path] = ()
) -> Iterator[Confinement]:
    """Hold a process to limits, and let it go in the end.

    Args:
        process_id: A child that was not waited for, of one thread still.
        limits: The limits.
        groups: Control groups to put it in; without one, the process is watched, or stopped by turns.
        files: Files whose pages count in full, whoever else maps them.
    """
    joined = {name: group for name, group in groups.items() if group.add(process_id)}
    os.sched_setaffinity(process_id, sorted(os.sched_getaffinity(0))[: limits.usable_cores])
    with ExitStack() as held:
        watch = held.enter_context(Watch(process_id, limits.memory_bytes, limits.timeout_s, files))
        if limits.cpu_share < 1 and "cpu" not in joined:
            held.enter_context(DutyCycle(process_id, limits.cpu_share))
        yield Confinement(limits, watch, joined)
