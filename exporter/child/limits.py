"""Limits that a child process sets on itself before it starts work."""

import ctypes
import math
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from exporter.foundation.cpu import available_cores

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent dies, even if this process is stopped at the time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def leave_no_core() -> None:
    """Disable core dumps of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_memory(more_bytes: int) -> None:
    """Limit the writable memory of this process to `more_bytes` beyond its current size, and to the physical memory.

    This limits data and not address space, since runtimes map files and reserve more than they use. Only Linux enforces
    it.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGESIZE")
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * page
    _lower(resource.RLIMIT_DATA, min(held + more_bytes, os.sysconf("SC_PHYS_PAGES") * page))


def limit_cpu(seconds: float) -> None:
    """Let the system kill this process once it has used the CPU time of all its cores for `seconds` from now."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    # In whole seconds, rounded up so that the parent's deadline comes first.
    allowed = math.ceil(time.process_time() + seconds * available_cores()) + 1
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, most))


def _lower(limit: int, most: int) -> None:
    before = [one for one in resource.getrlimit(limit) if one != resource.RLIM_INFINITY]
    lowest = min([most, *before])
    resource.setrlimit(limit, (lowest, lowest))
