"""Time and memory of the stages of a job."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import psutil

SAMPLE_SECONDS = 0.05

P = ParamSpec("P")
R = TypeVar("R")


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

    def __call__(self, name: str, work: Callable[P, R], *given: P.args, **named: P.kwargs) -> R:
        """Do the work of a stage, and record its time and peak memory."""
        with self.stage(name):
            return work(*given, **named)

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


def resident_bytes() -> int:
    """Return the resident set of this process and its children; shared pages of mapped files count once each."""
    total = 0
    process = psutil.Process(os.getpid())
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total
