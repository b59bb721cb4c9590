"""Limits that a child process sets on itself before it starts work."""

import ctypes
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from exporter.foundation.cpu import available_cores
from exporter.foundation.systems import hard_limit, limit_process, process_limits

PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Let the system kill this process when its parent dies, even if this process is stopped at the time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def leave_no_core() -> None:
    """Disable core dumps of this process."""
    limit_process("RLIMIT_CORE", 0)


def limit_memory(more_bytes: int) -> None:
    """Limit the writable memory of this process to `more_bytes` beyond its current size, and to the physical memory.

    This limits data and not address space, since runtimes map files and reserve more than they use. Only Linux enforces
    it.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGESIZE")
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5]) * page
    most = min(held + more_bytes, os.sysconf("SC_PHYS_PAGES") * page)
    limit_process("RLIMIT_DATA", min([most, *process_limits("RLIMIT_DATA")]))


def limit_cpu(seconds: float) -> None:
    """Let the system kill this process once it has used the CPU time of all its cores for `seconds` from now."""
    # In whole seconds, rounded up so that the parent's deadline comes first.
    allowed = math.ceil(time.process_time() + seconds * available_cores()) + 1
    with suppress(ValueError, OSError):
        # The hard limit stays as it is, so that the next call can raise the soft one.
        limit_process("RLIMIT_CPU", allowed, hard_limit("RLIMIT_CPU"))
