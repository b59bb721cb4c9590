"""The memory of a command and its children, watched from outside."""

import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import psutil

from tests.commands import started

SAMPLE_SECONDS = 0.15


@dataclass(frozen=True)
class Resident:
    """Bytes in memory of several processes, or the largest that they had, each at its own time.

    Attributes:
        total: Resident sets, pages of mapped files and of shared libraries included, each process's by itself.
        proportional: The same with every page shared among those that have it.
        anonymous: What no file stands behind: the system can give it to nobody else.
    """

    total: int = 0
    proportional: int = 0
    anonymous: int = 0

    def larger(self, other: "Resident") -> "Resident":
        """Return the larger of each figure."""
        names = [field.name for field in fields(self)]
        return Resident(**{name: max(getattr(self, name), getattr(other, name)) for name in names})

    def __str__(self) -> str:
        parts = (f"{field.name} {getattr(self, field.name) / (1 << 20):,.0f} MiB" for field in fields(self))
        return ", ".join(parts)


def watched(folder: Path, *arguments: str) -> tuple[Resident, float]:
    """Run a command that must succeed; return the largest figures of it and its children, and its seconds."""
    began = time.perf_counter()
    with started(folder, *arguments) as process:
        peak = Resident()
        while process.poll() is None:
            peak = peak.larger(_resident(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.returncode == 0, (folder / "errors.txt").read_text("utf-8")[-2000:]
    return peak, time.perf_counter() - began


def _resident(pid: int) -> Resident:
    total = proportional = anonymous = 0
    # Processes may end while they are read.
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(OSError, KeyError):
                kept = _rollup(one.pid)
                total += kept["Rss:"]
                proportional += kept["Pss:"]
                anonymous += kept["Anonymous:"]
    return Resident(total, proportional, anonymous)


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines()[1:]
    return {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
