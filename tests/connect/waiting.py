"""What ends, and what becomes true, a little later."""

import time
from collections.abc import Callable
from pathlib import Path


def becomes(true: Callable[[], bool]) -> bool:
    """Whether something becomes true within ten seconds."""
    return any(true() or time.sleep(0.05) for _ in range(200))


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and not waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
