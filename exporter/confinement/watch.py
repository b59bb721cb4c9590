"""Watching a process from outside: its memory, its time, and the share of the CPU that it gets."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

LOOK_S = 0.02
CYCLE_S = 0.1
Ending = Literal["memory", "time"]


class Watch:
    """Looks at a process every 20 ms, and ends it once it holds more memory or takes longer than it may.

    Memory is the proportional set: pages that several processes map count in parts. An address space is no measure:
    runtimes reserve more than they use.

    Args:
        process_id: The process; it must not have been waited for.
        memory_bytes: Most memory; None for no limit.
        timeout_s: Seconds from now.

    Attributes:
        peak_bytes: The largest proportional set that was seen.
        ended: Why the process was ended, None where it was not.
    """

    def __init__(self, process_id: int, memory_bytes: int | None, timeout_s: float) -> None:
        self.peak_bytes = 0
        self.ended: Ending | None = None
        self._process_id = process_id
        self._memory_bytes = memory_bytes
        self._end = time.monotonic() + timeout_s
        self._closed = threading.Event()
        # A process id may be given anew once the process was waited for; this handle is never another's.
        self._handle = os.pidfd_open(process_id)
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while self.ended is None and not self._closed.wait(LOOK_S):
            held = proportional_bytes(self._process_id) or 0
            self.peak_bytes = max(self.peak_bytes, held)
            if self._memory_bytes is not None and held > self._memory_bytes:
                self._kill("memory")
            elif time.monotonic() > self._end:
                self._kill("time")

    def _kill(self, reason: Ending) -> None:
        self.ended = reason
        send(self._handle, signal.SIGKILL)

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()
        os.close(self._handle)


class DutyCycle:
    """Stops and continues a process by turns, so that it runs for a share of the time.

    How long it did run and stand is summed up, and each stop makes up for what the ones before it missed.

    Args:
        process_id: The process; it must not have been waited for.
        share: Share of the time that it may run, above 0, below 1.
    """

    def __init__(self, process_id: int, share: float) -> None:
        self._share = share
        self._closed = threading.Event()
        self._handle = os.pidfd_open(process_id)
        self._thread = threading.Thread(target=self._turn, daemon=True)

    def _turn(self) -> None:
        ran = stood = 0.0
        while not self._closed.is_set():
            ran += self._pass(self._share * CYCLE_S)
            send(self._handle, signal.SIGSTOP)
            stood += self._pass(ran * (1 - self._share) / self._share - stood)
            send(self._handle, signal.SIGCONT)

    def _pass(self, seconds: float) -> float:
        """Let seconds pass, and return how many really did."""
        started = time.perf_counter()
        self._closed.wait(max(seconds, 0))
        return time.perf_counter() - started

    def __enter__(self) -> Self:
        """Begin with a turn that it runs."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it run."""
        self._closed.set()
        self._thread.join()
        os.close(self._handle)


def send(handle: int, number: signal.Signals) -> None:
    """Send a signal to the process of a handle, if it is still there."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)


def proportional_bytes(process_id: int) -> int | None:
    """Return the proportional set of a process, swap included; None where that cannot be read."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split() for line in lines if line.startswith(("Pss:", "SwapPss:"))]
    return sum(1024 * int(size) for _, size, _ in sizes) if sizes else None
