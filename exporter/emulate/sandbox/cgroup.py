"""Control groups created below those of this process, where the system allows it.

No existing group is changed. The kernel's admin-guide describes the files: cgroup-v1 and cgroup-v2.
"""

import os
import secrets
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREFIX = "edge-exporter"
# Periods of a quota: short, so that short runs are slowed evenly; the kernel takes no quota of less than 1 ms.
PERIOD_US, LONGEST_PERIOD_US, LEAST_QUOTA_US = 20_000, 100_000, 1000
REMOVING_S = 2.0
OWN, MOUNTS = Path("/proc/self/cgroup"), Path("/proc/self/mountinfo")
V2 = "cgroup2"
Controller = Literal["memory", "cpu"]
CONTROLLERS: tuple[Controller, ...] = ("memory", "cpu")


@dataclass(frozen=True)
class Place:
    """An existing group below which a new one may be created, and the controllers that it offers."""

    folder: Path
    version: int
    controllers: tuple[Controller, ...]


@dataclass(frozen=True)
class ControlGroup:
    """A group created by this process.

    Attributes:
        folder: Its folder.
        version: 1 or 2.
    """

    folder: Path
    version: int

    def limit(self, controller: Controller, most: float) -> bool:
        """Limit memory to bytes, swap included, or CPU time to cores; return whether that succeeded."""
        period = PERIOD_US if most * PERIOD_US >= LEAST_QUOTA_US else LONGEST_PERIOD_US
        size, quota = int(most), round(most * period)
        required: dict[tuple[int, Controller], dict[str, object]] = {
            (1, "memory"): {"memory.limit_in_bytes": size},
            (2, "memory"): {"memory.max": size},
            (1, "cpu"): {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": quota},
            (2, "cpu"): {"cpu.max": f"{quota} {period}"},
        }
        held = self._write(required[self.version, controller])
        if controller == "memory":
            # Without accounting of swap this file does not exist.
            self._write({"memory.swap.max": 0} if self.version == 2 else {"memory.memsw.limit_in_bytes": size})
        return held

    def add(self, process_id: int) -> bool:
        """Move a process here and return whether that was allowed."""
        return self._write({"cgroup.procs": process_id})

    @property
    def killed(self) -> bool:
        """Whether the system killed a process here for lack of memory."""
        return self._count("memory.events" if self.version == 2 else "memory.oom_control", "oom_kill") > 0

    @property
    def paged_bytes(self) -> int:
        """Bytes of files that were read again because the limit had evicted them from memory."""
        # A lack of memory on the whole machine counts in the same statistic.
        hit = self._count("memory.events", "max") if self.version == 2 else self._count("memory.failcnt", "")
        return self._count("memory.stat", "workingset_refault_file") * os.sysconf("SC_PAGESIZE") if hit else 0

    def remove(self) -> None:
        """Kill the processes that are left in the group, and delete it."""
        end = time.monotonic() + REMOVING_S
        while time.monotonic() < end:
            # A group is busy for a moment after its last process ended.
            with suppress(OSError):
                self.folder.rmdir()
                return
            with suppress(OSError, ValueError):
                for process_id in map(int, (self.folder / "cgroup.procs").read_text(encoding="ascii").split()):
                    os.kill(process_id, signal.SIGKILL)
            time.sleep(0.01)

    def _write(self, texts: Mapping[str, object]) -> bool:
        try:
            for file, text in texts.items():
                # Never created: a missing file is a limit that this group cannot set.
                descriptor = os.open(self.folder / file, os.O_WRONLY)
                try:
                    os.write(descriptor, str(text).encode())
                finally:
                    os.close(descriptor)
        except OSError:
            return False
        return True

    def _count(self, file: str, name: str) -> int:
        with suppress(OSError):
            for line in (self.folder / file).read_text(encoding="ascii").splitlines():
                key, _, count = line.rpartition(" ")
                if key == name:
                    return int(count)
        return 0


@contextmanager
def control_groups(limits: Mapping[Controller, float]) -> Iterator[dict[Controller, ControlGroup]]:
    """Create groups that enforce limits, and delete them at the end.

    Args:
        limits: Bytes of `memory`, cores of `cpu`.

    Yields:
        The group of each limit for which one could be created; in version 2 both limits share one group.
    """
    groups: dict[Controller, ControlGroup] = {}
    try:
        for place in places(OWN.read_text(), MOUNTS.read_text()) if OWN.exists() else ():
            _remove_stale(place.folder)
            _make_below(place, limits, groups)
        yield groups
    finally:
        for group in set(groups.values()):
            group.remove()


def _make_below(place: Place, limits: Mapping[Controller, float], groups: dict[Controller, ControlGroup]) -> None:
    """Add a group below a place for limits that have none yet."""
    # A process can be in only one group of version 2.
    taken = place.version == 2 and any(group.version == 2 for group in groups.values())
    missing = [name for name in place.controllers if name in limits and name not in groups]
    if taken or not missing:
        return
    made = ControlGroup(place.folder / f"{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}", place.version)
    with suppress(OSError):
        made.folder.mkdir()
        held = [name for name in missing if made.limit(name, limits[name])]
        groups.update(dict.fromkeys(held, made))
        if not held:
            made.remove()


def _remove_stale(folder: Path) -> None:
    """Delete the empty groups of exporters that were killed."""
    for stale in folder.glob(f"{PREFIX}-*-*"):
        owner = stale.name.split("-")[-2]
        if owner.isdecimal() and not Path("/proc", owner).exists():
            with suppress(OSError):
                stale.rmdir()


def places(own: str, mounts: str) -> list[Place]:
    """Return the places where groups may be created, those of version 2 first.

    In version 2 a group with processes delegates no controllers, so the group above it is a place, too.

    Args:
        own: The text of /proc/self/cgroup.
        mounts: The text of /proc/self/mountinfo.
    """
    mounted = _mounted(mounts)
    found = []
    for line in own.splitlines():
        number, names, path = line.split(":", 2)
        held = tuple(name for name in CONTROLLERS if name in names.split(","))
        kinds = (V2,) if number == "0" else held[:1]
        for root, mount in (mounted[kind] for kind in kinds if kind in mounted):
            if ".." in Path(path).parts or not Path(path).is_relative_to(root):
                continue  # it is not in the part of the tree that is mounted
            folder = mount / Path(path).relative_to(root)
            if kinds == held[:1]:
                found.append(Place(folder, 1, held))
            else:
                found += [Place(one, 2, CONTROLLERS) for one in (folder, folder.parent) if one.is_relative_to(mount)]
    return sorted(found, key=lambda place: -place.version)


def _mounted(mounts: str) -> dict[str, tuple[str, Path]]:
    """Return a controller of version 1, or `cgroup2` -> the mounted group and its mount point."""
    found: dict[str, tuple[str, Path]] = {}
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, mount = fields.split()[3:5]
        kinds = {V2: (V2,), "cgroup": options.split(",")}.get(kind, ())
        found |= {name: (root, Path(mount)) for name in kinds}
    return found
