"""Mutations of each kind of input, tried in processes that are watched: what ends in no sentence is a finding."""

import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil

from exporter.foundation.errors import ExporterError

if TYPE_CHECKING:  # it brings all of the product along
    from tests.fuzz.subjects import Attempt

# What one mutation may take: of the processor, or of the clock where it waits.
PROCESSOR_S, CLOCK_S = 5.0, 60.0
GROWTH_BYTES = 512 << 20
# A process that has grown by so much over many mutations is replaced: tokenizers keeps 0.7 MiB of each tokenizer that
# it has used, and the system counts the memory of a process as that of its next child, too.
REPLACED_BYTES = 128 << 20
# The longest sentence.
MOST_CHARACTERS = 4000
ACCEPTED, REFUSED = "accepted", "refused"
# A process that imports nothing anew is made in milliseconds.
_context = get_context("forkserver")
_context.set_forkserver_preload(["tests.fuzz.subjects", "tests.fuzz.bombs"])


@dataclass(frozen=True)
class Ending:
    """How a mutation ended."""

    subject: str
    seed: int
    number: int
    what: str

    def __str__(self) -> str:
        """Return what happened, and how to see it again."""
        again = f"make fuzz ONLY={self.subject} SEED={self.seed} FIRST={self.number} COUNT=1"
        return f"{self.subject} {self.number}: {self.what}\n    {again}"


@dataclass
class Tally:
    """How the mutations of one subject ended."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[Ending] = field(default_factory=list)

    def add(self, ending: Ending) -> None:
        """Count how a mutation ended."""
        self.accepted += ending.what == ACCEPTED
        self.refused += ending.what == REFUSED
        if ending.what not in (ACCEPTED, REFUSED):
            self.findings.append(ending)


def fuzz(subject: str, seed: int, first: int, count: int) -> Tally:
    """Try some mutations of a subject; the same seed gives the same mutations.

    Args:
        subject: A name in `tests.fuzz.subjects.SUBJECTS`.
        seed: Any number.
        first: Number of the first mutation.
        count: How many.
    """
    tally, started = Tally(), time.monotonic()
    left = range(first, first + count)
    while left:
        with _Worker(subject, seed, left) as worker:
            while left and worker.usable:
                tally.add(Ending(subject, seed, left[0], worker.ended()))
                left = left[1:]
    tally.seconds = time.monotonic() - started
    return tally


class _Worker:
    """A process that tries mutations one after the other."""

    def __init__(self, subject: str, seed: int, numbers: range) -> None:
        self.usable = True
        self._folder = TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True)
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_work, args=(theirs, subject, seed, numbers, self._folder.name))
        self._process.start()
        theirs.close()
        ready = self._received(CLOCK_S * 5, CLOCK_S * 5)
        if ready != "ready":
            raise AssertionError(f"{subject}: what is not changed is not taken: {ready}")
        self._first_bytes = _resident_bytes(self._process)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self._process)
        self._pipe.close()
        self._folder.cleanup()

    def ended(self) -> str:
        """Return how the next mutation ended."""
        ended = self._received(PROCESSOR_S, CLOCK_S)
        # A child that grew by so much would hide the growth of others.
        grown = _resident_bytes(self._process) - self._first_bytes
        self.usable = self.usable and "MiB" not in ended and grown < REPLACED_BYTES
        return ended

    def _received(self, processor_s: float, clock_s: float) -> str:
        spent, started = _processor_s(self._process), time.monotonic()
        try:
            while not self._pipe.poll(0.2):
                took, waited = _processor_s(self._process) - spent, time.monotonic() - started
                if took > processor_s or waited > clock_s:
                    self.usable = False
                    return f"no end after {took:.1f} s of the processor, {waited:.1f} s of the clock"
            return str(self._pipe.recv())
        except EOFError:
            self.usable = False
            self._process.join()
            return f"the process died with code {self._process.exitcode}"


def _resident_bytes(process: BaseProcess) -> int:
    try:
        return int(psutil.Process(process.pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _processor_s(process: BaseProcess) -> float:
    """Return the time that a process took of the processor, or the one of its children that took most."""
    try:
        own = psutil.Process(process.pid)
        times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    return max(one.user + one.system for one in times)


def _kill(process: BaseProcess) -> None:
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        if child.is_running():
            child.kill()
    process.join()


def _work(pipe: Connection, subject: str, seed: int, numbers: range, folder: str) -> None:
    """Prepare a subject and try its mutations; send how each ended."""
    from tests.fuzz.bombs import BOMBS
    from tests.fuzz.subjects import SUBJECTS

    os.environ["EDGE_EXPORTER_CACHE"] = str(Path(folder, "cache"))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    attempt = (SUBJECTS | BOMBS)[subject](Path(folder))
    children = _peak_bytes(resource.RUSAGE_CHILDREN)
    pipe.send("ready")
    for number in numbers:
        # From here on, the peak is counted anew.
        Path("/proc/self/clear_refs").write_text("5")
        own = _peak_bytes(resource.RUSAGE_SELF)
        ended = _ended(attempt, Random(f"{subject}:{seed}:{number}"))
        if ended in (ACCEPTED, REFUSED):
            grown = max(_peak_bytes(resource.RUSAGE_SELF) - own, _peak_bytes(resource.RUSAGE_CHILDREN) - children)
            ended = f"a process grew by {grown >> 20:,} MiB" if grown > GROWTH_BYTES else ended
        pipe.send(ended)


def _peak_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss << 10


def _ended(attempt: "Attempt", chance: Random) -> str:
    """Return how an attempt ended: `accepted`, `refused`, or what is wrong with its end."""
    try:
        return ACCEPTED if attempt(chance) else REFUSED
    except ExporterError as error:
        text = str(error)
        if error.exit_code not in (1, 2, 3):
            return f"exit code {error.exit_code}: {text[:300]}"
        if len(text.splitlines()) != 1 or len(text) > MOST_CHARACTERS:
            return f"not one sentence, but {len(text.splitlines())} lines, {len(text)} characters: {text[:300]!r}"
        return REFUSED
    except BaseException as error:  # a panic of a Rust library is no Exception
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
        places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1][:4])
        return f"{type(error).__name__}: {str(error)[:200]!r} at {places}"
