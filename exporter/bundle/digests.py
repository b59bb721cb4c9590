"""Compares files with the SHA-256 that a manifest lists, and remembers which of them were compared already."""

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from exporter.bundle.manifest import FileEntry, sha256_read
from exporter.foundation.cache import cache_folder, replacing
from exporter.foundation.cache_entries import identity
from exporter.foundation.errors import ExporterError, InputError
from exporter.foundation.systems import READ_SAFELY

NEXT_STEP = "see edge-exporter verify, and get the bundle again"
MEMORY = "compared.json"
MOST_REMEMBERED = 2000
MOST_MEMORY_BYTES = 1 << 20
# A file that has just changed may change again without new times, since the clocks of file systems have ticks.
SETTLED_NS = 2_000_000_000


def require_listed(bundle: Path, entries: Iterable[FileEntry]) -> None:
    """Compare files of a bundle with their entries in its manifest.

    A file that was compared before is not read again while its device, inode, size and times are the same. Anyone who
    may write to the bundle can still change a file after this, before a runtime opens it by its name; nothing here
    prevents that.

    Args:
        bundle: The bundle's folder.
        entries: The expected entries of the files.

    Raises:
        InputError: a file is missing, is no regular file, cannot be read, or is not as listed.
    """
    memory = _Memory()
    for entry in entries:
        path = bundle / entry.path
        try:
            found = _compared(path, entry, memory)
        except OSError as error:
            raise InputError("cannot be read", where=path, got=error.strerror, next_step=NEXT_STEP) from error
        if found != entry.sha256:
            raise not_as_listed(path, found, entry.sha256)
    memory.save()


def require_sizes(bundle: Path, entries: Iterable[FileEntry]) -> None:
    """Refuse files that are missing, not regular, or not of the sizes that the manifest lists.

    Raises:
        InputError: a file is refused.
    """
    for entry in entries:
        path = bundle / entry.path
        try:
            found = path.lstat()
            size = found.st_size if stat.S_ISREG(found.st_mode) else "no regular file"
        except OSError as error:
            size = str(error.strerror)
        if size != entry.size:
            raise InputError("a file of the bundle is missing or truncated", where=path, got=size, expected=entry.size)


def read_listed(bundle: Path, entry: FileEntry, most_bytes: int) -> bytes:
    """Return the bytes of a small file of a bundle, checked against its manifest.

    Raises:
        InputError: it is larger than `most_bytes`, cannot be read, or is not as listed.
    """
    path = bundle / entry.path
    if entry.size > most_bytes:
        raise InputError("the file is too large", where=path, got=entry.size, expected=f"at most {most_bytes:,} bytes")
    try:
        with os.fdopen(os.open(path, READ_SAFELY), "rb") as file:
            data = file.read(entry.size + 1)
    except OSError as error:
        raise InputError("cannot be read", where=path, got=error.strerror, next_step=NEXT_STEP) from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry.sha256:
        raise not_as_listed(path, digest, entry.sha256)
    return data


def not_as_listed(path: Path, got: str, expected: str) -> InputError:
    """Return the error for a file whose SHA-256 differs from its manifest's."""
    return InputError(
        "the file is not the one that the manifest lists", where=path, got=f"SHA-256 {got}", expected=expected,
        next_step=NEXT_STEP,
    )  # fmt: skip


def _compared(path: Path, entry: FileEntry, memory: "_Memory") -> str:
    """Return the SHA-256 of a file, which is read only if it is not known to match already."""
    with os.fdopen(os.open(path, READ_SAFELY), "rb") as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise InputError("this is no regular file", where=path, next_step=NEXT_STEP)
        key = _key(before, entry.sha256)
        if key in memory:
            return entry.sha256
        started = time.time_ns()
        _, digest = sha256_read(file)
        settled = started - max(before.st_ctime_ns, before.st_mtime_ns) > SETTLED_NS
        if digest == entry.sha256 and settled and _key(os.fstat(file.fileno()), digest) == key:
            memory.add(key)
        return digest


def _key(found: os.stat_result, sha256: str) -> str:
    return ":".join([*map(str, identity(found)), sha256])


class _Memory:
    """The files found right: a list in the cache folder, the latest last; a damaged list counts as empty."""

    def __init__(self) -> None:
        self._keys: dict[str, None] = {}
        self._changed = False
        with suppress(OSError, ValueError, RecursionError, ExporterError):
            path = cache_folder() / MEMORY
            if path.stat().st_size <= MOST_MEMORY_BYTES:
                known = json.loads(path.read_text(encoding="ascii"))
                if isinstance(known, list) and all(isinstance(key, str) for key in known):
                    self._keys = dict.fromkeys(known)

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        self._keys[key] = None
        self._changed = True

    def save(self) -> None:
        """Write the latest remembered entries; without a cache nothing is remembered."""
        if self._changed:
            with suppress(OSError, ExporterError), replacing(cache_folder() / MEMORY) as partial:
                partial.write_text(json.dumps(list(self._keys)[-MOST_REMEMBERED:], indent=0), encoding="ascii")
