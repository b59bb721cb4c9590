"""Time and memory of the stages of a job."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

SAMPLE_SECONDS = 0.05
# glibc's numbers of its options, the largest block that it takes from the heap at all, and what may stay free at the
# heap's end until `give_back_freed_memory`.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
FROM_HEAP_UP_TO_BYTES, FREE_AT_END_BYTES = 32 << 20, 1 << 30


@dataclass(frozen=True)
class Stage:
    """What one stage took: seconds, and the largest resident set of this process and its children together."""

    name: str
    seconds: float
    peak_bytes: int


class Stages:
    """A record of stages in order."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @property
    def peak_bytes(self) -> int:
        """The largest resident set over all stages."""
        return max((stage.peak_bytes for stage in self.done), default=0)

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.done)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the time and peak memory of a block."""
        ended = threading.Event()
        peak = [resident_bytes()]

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                peak[0] = max(peak[0], resident_bytes())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            self.done.append(Stage(name, time.perf_counter() - started, peak[0]))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed until `give_back_freed_memory`: activations are the same blocks again and again.

    A block that it maps anew costs a page fault for each of its pages: a third of the time of a layer.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, FROM_HEAP_UP_TO_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, FREE_AT_END_BYTES)


def give_back_freed_memory() -> None:
    """Let glibc return all free pages to the system, wherever in the heap they are.

    What outlives a layer would leave holes between what does not, a gigabyte of them for a model of that many weights.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def resident_bytes() -> int:
    """Return the resident set of this process and its children; shared pages of mapped files count once each."""
    total = 0
    process = psutil.Process(os.getpid())
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total
