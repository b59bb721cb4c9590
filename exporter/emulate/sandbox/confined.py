"""A child process under a device's limits, enforced and watched from outside."""

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
    """The limits of a process and their enforcement.

    Attributes:
        limits: The limits.
        watch: Watches the process.
        groups: Control groups that it is in, by controller.
    """

    limits: ProcessLimits
    watch: Watch
    groups: dict[Controller, ControlGroup]

    @property
    def out_of_memory(self) -> bool:
        """Whether the process was killed because it needed more memory."""
        return self.watch.ended == "memory" or ("memory" in self.groups and self.groups["memory"].killed)

    @property
    def paged_bytes(self) -> int:
        """Bytes of files that it read again for lack of memory, as far as a control group reports them."""
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
    """Return the limits for control groups: bytes of memory, and cores if only a share of them may be used."""
    wanted: dict[Controller, float] = {}
    if limits.memory_bytes is not None:
        wanted["memory"] = limits.memory_bytes
    if limits.cpu_share < 1:
        wanted["cpu"] = limits.cpu_share * limits.usable_cores
    return wanted


def hindrance() -> str | None:
    """Return why limits cannot be enforced here; None if they can."""
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
    """Enforce limits on a process as long as the block lasts.

    Args:
        process_id: A child that was not waited for and still has one thread.
        limits: The limits.
        groups: Control groups for it; without one, the process is watched, or alternately stopped and continued.
        files: Files whose pages count in full, even if other processes map them.
    """
    joined = {name: group for name, group in groups.items() if group.add(process_id)}
    os.sched_setaffinity(process_id, sorted(os.sched_getaffinity(0))[: limits.usable_cores])
    with ExitStack() as held:
        watch = held.enter_context(Watch(process_id, limits.memory_bytes, limits.timeout_s, files))
        if limits.cpu_share < 1 and "cpu" not in joined:
            held.enter_context(DutyCycle(process_id, limits.cpu_share))
        yield Confinement(limits, watch, joined)
