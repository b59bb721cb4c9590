"""Entries of the cache, which are made again unless they are complete, unchanged and under their own name.

A file of an entry ends with a seal: the SHA-256 of its name and of the preceding bytes. A folder filled by other code
has a sealed list of its files with their SHA-256.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.foundation.cache import locked, naming_disk, replacing, scratch_folder
from exporter.foundation.errors import InputError

T = TypeVar("T")
Array = NDArray[np.generic]
Pieces = Iterable[bytes | memoryview]
Identity = tuple[int, ...]

# Increment when the seal itself changes.
MAGIC = b"edge-exporter 1\n"
SEAL_BYTES = len(MAGIC) + hashlib.sha256().digest_size
READ_BYTES = 1 << 20
LIST = ".files"

# The files that this process wrote or checked, with the identity that shows whether they are unchanged.
_known: set[tuple[Path, Identity]] = set()


class DamagedEntryError(InputError):
    """A file of the cache is missing, damaged, truncated or misplaced."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            "the cache was damaged while it was in use", where=path, next_step="run it again: what is missing is made"
        )


@dataclass(frozen=True)
class Form(Generic[T]):
    """The file format of a value.

    Attributes:
        pack: Converts it to pieces of bytes.
        load: Reads it from a file whose seal was checked.
    """

    pack: Callable[[T], Pieces]
    load: Callable[[Path], T]


def _pack_array(values: Array) -> Pieces:
    values = np.ascontiguousarray(values)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    return header.getvalue(), values.reshape(-1).view(np.uint8).data


def _load_array(path: Path) -> Array:
    values: Array = np.load(path, allow_pickle=False)
    return values


def _pack_vectors(vectors: dict[str, Array]) -> Pieces:
    packed = io.BytesIO()
    np.savez(packed, **vectors)  # type: ignore[arg-type]
    return (packed.getbuffer(),)


def _load_vectors(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(path.read_bytes()[:-SEAL_BYTES]), allow_pickle=False) as saved:
        return dict(saved)


def _load_json(path: Path) -> Any:
    return json.loads(path.read_bytes()[:-SEAL_BYTES])


ARRAY: Form[Any] = Form(_pack_array, _load_array)
VECTORS: Form[dict[str, NDArray[Any]]] = Form(_pack_vectors, _load_vectors)
JSON: Form[Any] = Form(lambda value: (json.dumps(value).encode(),), _load_json)


def kept(path: Path, form: Form[T], make: Callable[[], T]) -> T:
    """Return the value of a cache file, which is made first if missing or damaged.

    Args:
        path: The file, below a folder of one of `exporter.foundation.cache.KINDS`.
        form: The file format.
        make: Makes the value, while all other processes that need it wait.
    """
    with suppress(DamagedEntryError):
        return load(path, form)
    with locked(path):
        # Another process may have made it.
        with suppress(DamagedEntryError):
            return load(path, form)
        made = make()
        save(path, form, made)
        return made


def kept_folder(place: Path, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, which is made first if missing or damaged.

    Args:
        place: The folder, below that of one of `exporter.foundation.cache.KINDS`.
        make: Fills an empty folder that becomes `place`, while all other processes that need it wait.
    """
    if folder_is_whole(place):
        return place
    with locked(place):
        if folder_is_whole(place):
            return place
        with scratch_folder(place.parent, place.name) as folder:
            make(folder)
            for path in sorted(folder.rglob("*"), reverse=True):
                if not path.is_symlink():
                    path.chmod(0o700 if path.is_dir() else 0o600 | path.stat().st_mode & 0o100)
                    _sync(path)
            _sync(folder)
            shutil.rmtree(place, ignore_errors=True)
            folder.rename(place)
        save(place / LIST, JSON, _listed(place))
    return place


def folder_is_whole(place: Path) -> bool:
    """Return whether a folder of the cache holds exactly what `kept_folder` made."""
    try:
        return bool(load(place / LIST, JSON) == _listed(place))
    except (DamagedEntryError, OSError):
        return False


def _listed(place: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file, or the target of a link."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(place))] = f"-> {path.readlink()}"
        elif path.is_file() and path != place / LIST:
            found[str(path.relative_to(place))] = _digest(path, identity(path.stat()))
    return found


@cache
def _digest(path: Path, _: Identity) -> str:
    """Return the SHA-256 of a file, cached by its identity."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path, form: Form[T]) -> T:
    """Return the value of a cache file.

    Raises:
        DamagedEntryError: it is missing, damaged, truncated or misplaced.
    """
    require_whole(path)
    return form.load(path)


def is_whole(path: Path) -> bool:
    """Return whether a cache file is present and unchanged."""
    try:
        require_whole(path)
    except DamagedEntryError:
        return False
    return True


def require_whole(path: Path) -> None:
    """Check a cache file against its seal, the first time that this process sees it.

    Raises:
        DamagedEntryError: it is missing, damaged, truncated or misplaced.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if (path, identity(found)) in _known:
                return
            left = found.st_size - SEAL_BYTES
            digest = _begun(path)
            while left > 0 and (piece := file.read(min(left, READ_BYTES))):
                digest.update(piece)
                left -= len(piece)
            if left != 0 or file.read() != MAGIC + digest.digest():
                raise DamagedEntryError(path)
    except OSError as error:
        raise DamagedEntryError(path) from error
    _known.add((path, identity(found)))


def save(path: Path, form: Form[T], value: T) -> None:
    """Write a cache file with its seal atomically, and force it to the disk.

    Raises:
        RequestError: the disk is full.
    """
    _write(path, form, value)
    _force(path)


class Filling:
    """A folder of the cache that is filled file by file; files are synced to disk in the background.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, force: Callable[[Path], object]) -> None:
        self.path = path
        self._force = force

    def save(self, name: str, form: Form[T], value: T, lasting: bool = True) -> None:
        """Write a file with its seal atomically.

        Args:
            name: Its name.
            form: The file format.
            value: The value.
            lasting: Sync the file to disk; not needed for files that only serve to resume a killed job.

        Raises:
            RequestError: the disk is full.
        """
        _write(self.path / name, form, value)
        if lasting:
            self._force(self.path / name)


@contextmanager
def filling(folder: Path) -> Iterator[Filling]:
    """Yield a writer of files into a folder; they are synced to disk at the end of the block."""
    begun: list[Future[None]] = []
    pool = ThreadPoolExecutor(1)
    try:
        yield Filling(folder, lambda path: begun.append(pool.submit(_force, path)))
        for one in begun:
            one.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(path: Path, form: Form[T], value: T) -> None:
    with replacing(path, 0o600) as partial, partial.open("wb") as file:
        digest = _begun(path)
        for piece in form.pack(value):
            digest.update(piece)
            file.write(piece)
        file.write(MAGIC + digest.digest())
    _known.add((path, identity(path.stat())))


def _force(path: Path) -> None:
    with naming_disk(path.parent):
        _sync(path)
        _sync(path.parent)


def _begun(path: Path) -> "hashlib._Hash":
    """Return a digest started with the file's name, so that a renamed file does not match."""
    return hashlib.sha256(f"{path.parent.name}/{path.name}\n".encode())


def identity(found: os.stat_result) -> Identity:
    """Return values that change when a file is replaced or overwritten."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
