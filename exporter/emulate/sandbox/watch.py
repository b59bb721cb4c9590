"""Watches a process from outside: its memory, its time and its share of the CPU."""

import os
import re
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

LOOK_S = 0.02
CYCLE_S = 0.02
# Number of looks between two at single mappings, which take longer.
LOOKS = 10
# In /proc/PID/smaps: the line of a mapping of a file with one of these inodes, then its pages and its share in KiB.
MAPPING = rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ (?:%b) .*\n(?:\w+: .*\n)*?Rss: +(\d+) kB\nPss: +(\d+) kB"
Ending = Literal["memory", "time"]


class _Beside(ABC):
    """A thread that watches or controls a process; both exist from entering to leaving the context.

    Args:
        process_id: The process; it must not have been waited for.
    """

    def __init__(self, process_id: int) -> None:
        self._closed = threading.Event()
        # A process id may be reused once the process was waited for; this handle is never another's.
        self._handle = os.pidfd_open(process_id)
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    @abstractmethod
    def _go_on(self) -> None:
        """Do the work until `_closed` is set."""

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread and leave the process running."""
        self._closed.set()
        self._thread.join()
        os.close(self._handle)


class Watch(_Beside):
    """Checks a process every 20 ms, and kills it once it holds more memory or takes longer than allowed.

    Memory is the proportional set: pages that several processes map count in parts, except those of the artifact.
    Address space is no measure, since runtimes reserve more than they use.

    Args:
        process_id: The process; it must not have been waited for.
        memory_bytes: Most memory; None for no limit.
        timeout_s: Seconds from now.
        files: Files whose pages count in full, even if other processes map them.

    Attributes:
        peak_bytes: The largest proportional set observed.
        ended: Why the process was killed; None if it was not.
    """

    def __init__(
        self, process_id: int, memory_bytes: int | None, timeout_s: float, files: Collection[Path] = ()
    ) -> None:
        super().__init__(process_id)
        self.peak_bytes = 0
        self.ended: Ending | None = None
        self._process_id = process_id
        self._memory_bytes = memory_bytes
        self._files = files
        self._end = time.monotonic() + timeout_s

    def _go_on(self) -> None:
        shared = 0
        for look in count():
            if self.ended is not None or self._closed.wait(LOOK_S):
                return
            if look % LOOKS == 0:
                shared = shared_bytes(self._process_id, self._files)
            held = proportional_bytes(self._process_id) + shared
            self.peak_bytes = max(self.peak_bytes, held)
            if self._memory_bytes is not None and held > self._memory_bytes:
                self._kill("memory")
            elif time.monotonic() > self._end:
                self._kill("time")

    def _kill(self, reason: Ending) -> None:
        self.ended = reason
        send(self._handle, signal.SIGKILL)


class DutyCycle(_Beside):
    """Alternately stops and continues a process, so that it runs for a share of the time.

    Running and stopped times are summed, and each stop compensates for the error of earlier ones.

    Args:
        process_id: The process; it must not have been waited for.
        share: Share of the time that it may run, above 0, below 1.
    """

    def __init__(self, process_id: int, share: float) -> None:
        super().__init__(process_id)
        self._share = share

    def _go_on(self) -> None:
        ran = stood = 0.0
        while not self._closed.is_set():
            ran += self._pass(self._share * CYCLE_S)
            send(self._handle, signal.SIGSTOP)
            stood += self._pass(ran * (1 - self._share) / self._share - stood)
            send(self._handle, signal.SIGCONT)

    def _pass(self, seconds: float) -> float:
        """Wait for some seconds and return how many really passed."""
        started = time.perf_counter()
        self._closed.wait(max(seconds, 0))
        return time.perf_counter() - started


def send(handle: int, number: signal.Signals) -> None:
    """Send a signal to the process of a handle, if it still exists."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)


def proportional_bytes(process_id: int) -> int:
    """Return the proportional set of a process, swap included, in bytes; 0 if it cannot be read."""
    lines = _read(process_id, "smaps_rollup").decode("ascii").splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss:", "SwapPss:")))


def shared_bytes(process_id: int, files: Collection[Path]) -> int:
    """Return the share of a process's pages of some files that counts for other processes, in bytes."""
    if not files:
        return 0
    inodes = b"|".join(str(file.stat().st_ino).encode() for file in files)
    sizes = re.findall(MAPPING % inodes, _read(process_id, "smaps"), re.MULTILINE)
    return 1024 * sum(int(resident) - int(proportional) for resident, proportional in sizes)


def _read(process_id: int, name: str) -> bytes:
    try:
        return Path("/proc", str(process_id), name).read_bytes()
    except OSError:
        return b""
