"""What may befall the files of a cache."""

from collections.abc import Callable, Iterator
from pathlib import Path


def flipped(content: bytes) -> bytes:
    """Return the bytes with one bit flipped in the middle, which counts even where a format has room to spare."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 4 for byte in content[middle : middle + 1]) + content[middle + 1 :]


def halved(content: bytes) -> bytes:
    """Return the first half."""
    return content[: len(content) // 2]


def emptied(_: bytes) -> bytes:
    """Return nothing."""
    return b""


DAMAGES: list[Callable[[bytes], bytes]] = [flipped, halved, emptied]


def cached_files(cache: Path) -> Iterator[Path]:
    """Yield every file of a cache."""
    return (path for path in sorted(cache.rglob("*")) if path.is_file())


def left_over(folder: Path) -> list[str]:
    """Return what lies anywhere below a folder that only a running job may have."""
    held = [path for path in folder.rglob("held/*") if path.is_file()]
    patterns = ("*.partial-*", "edge-exporter*.log", "inputs.*", "gradient.*")
    return sorted(map(str, [*held, *(path for pattern in patterns for path in folder.rglob(pattern))]))
