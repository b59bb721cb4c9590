"""Progress callbacks for long operations."""

from collections.abc import Callable

# Called with a stage's name, steps done, and their total.
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""
