"""The cache folder, and writes that are whole or not there at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.errors import RequestError


def cache_folder(*parts: str) -> Path:
    """Return (and make) a folder of the cache: `$EDGE_EXPORTER_CACHE`, or the user's cache folder."""
    named = os.environ.get("EDGE_EXPORTER_CACHE")
    root = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edge-exporter")
    folder = root.joinpath(*parts)
    try:
        # Private: it holds what was computed from the user's texts.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            "the cache folder cannot be made",
            where=folder,
            got=error.strerror,
            next_step="name another in EDGE_EXPORTER_CACHE",
        ) from error
    return folder


def require_space(folder: Path, need_bytes: int, next_step: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        RequestError: the folder's disk has less free space; `next_step` says what to do.
    """
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise RequestError(
            "not enough free disk space",
            where=folder,
            got=f"{free:,} bytes",
            expected=f"at least {need_bytes:,} bytes",
            next_step=next_step,
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the name when all went well, else it goes."""
    # Not tempfile.mkstemp: its private mode would stay with the finished file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_array(path: Path, values: NDArray[np.generic]) -> None:
    """Write an array as a .npy file that is whole or not there at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, values)


def save_vectors(path: Path, vectors: dict[str, np.ndarray]) -> None:
    """Write named arrays as a .npz file that is whole or not there at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **vectors)  # type: ignore[arg-type]


def load_vectors(path: Path) -> dict[str, np.ndarray]:
    """Return the named arrays of a .npz file."""
    with np.load(path, allow_pickle=False) as saved:
        return dict(saved)
