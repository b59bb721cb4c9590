"""The coded file: a header that describes the original, then its chunks, each with its size and checksum.

    header   magic, version, name, size and SHA-256 of the original; CRC-32 of the header
    chunk    bytes of the original, bytes of the payload, CRC-32 of both and of the payload; the payload

Integers are little-endian. Changed, truncated or extended files are rejected: chunks by their checksum, the whole by
size and SHA-256.
"""

import hashlib
import os
import shutil
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, TypeVar, get_args

from exporter.coding.byte_reader import Reading
from exporter.coding.chunk import CodedChunk, decode, encode
from exporter.coding.layout import FileSection, Part, parts_of
from exporter.coding.profiles import Profile
from exporter.foundation.cache import replacing
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import ExporterError, InputError, RequestError

MAGIC = b"\x89EDGECOD"
VERSION = 1
SUFFIX = ".coded"
PROFILES: tuple[Profile, ...] = get_args(Profile)
# Bytes of the original per chunk. `small` uses many, to give `ans` long lanes; `fast` uses few, since restoring takes
# several times as much memory.
CHUNK_BYTES: dict[Profile, int] = {"small": 1 << 23, "fast": 1 << 20}
LEAST_CHUNK_BYTES, MOST_CHUNK_BYTES = min(CHUNK_BYTES.values()), max(CHUNK_BYTES.values())
# The header without the name.
_FIXED = struct.Struct("<8sHQ32sH")
_CHECKSUM = struct.Struct("<I")
_CHUNK = struct.Struct("<III")
# Allows for the layout and tables of a chunk that does not shrink.
_MOST_PAYLOAD = 2 * MOST_CHUNK_BYTES
# Weights shrink to a tenth at best. A file beyond this ratio is mere repetition and may be meant to fill the disk.
MOST_RATIO, UNSUSPECTED_BYTES = 1000, 64 << 20
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class CodedSize:
    """The sizes of a file before and after coding.

    Attributes:
        original_bytes: Bytes of the file.
        coded_bytes: Total bytes of the coded file.
        entropy_bytes: Lower bound for its streams, each coded byte by byte with one histogram of no cost; several
            histograms for the rows of a matrix can take less.
    """

    original_bytes: int
    coded_bytes: int
    entropy_bytes: int


@dataclass(frozen=True)
class Original:
    """The header's description of the original file."""

    name: str
    size: int
    sha256: bytes


def code_file(
    path: Path,
    to: Path,
    profile: Profile = "small",
    layout: Sequence[FileSection] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CodedSize:
    """Write the coded form of a file; every chunk is restored and compared before it is written.

    Args:
        path: The file.
        to: The coded file; it appears under this name only when complete.
        profile: `small` for the fewest bytes, `fast` for fast restoring.
        layout: The known sections of the file.
        progress: Called with the bytes done and their total.

    Raises:
        RequestError: there is no such profile.
        InputError: the file became shorter while it was read.
        ExporterError: the coded file does not read back as the original.
    """
    if profile not in PROFILES:
        raise RequestError("unknown profile of coding", got=profile, expected=" or ".join(PROFILES))
    size = path.stat().st_size
    most = CHUNK_BYTES[profile]
    groups = _groups(parts_of(layout, size, most), most)
    whole, done, entropy = hashlib.sha256(), 0, 0.0

    def code(given: tuple[bytes, list[Part]]) -> tuple[bytes, CodedChunk]:
        data, parts = given
        chunk = encode(data, parts, profile)
        if decode(chunk.payload, len(data)).tobytes() != data:
            raise ExporterError("a chunk was not restored as it was", where=path)
        return data, chunk

    with path.open("rb") as source, replacing(to) as partial, partial.open("wb") as file:
        file.write(_header(Original(path.name, size, bytes(32))))
        for data, chunk in on_all_cores(code, ((_read(source, group, path), group) for group in groups)):
            whole.update(data)
            file.write(_chunk_head(len(data), chunk.payload) + chunk.payload)
            done, entropy = done + len(data), entropy + chunk.entropy_bytes
            progress(done, size)
        coded = file.tell()
        file.seek(0)
        file.write(_header(Original(path.name, size, whole.digest())))
        file.flush()
        os.fsync(file.fileno())
    return CodedSize(size, coded, round(entropy))


def original_of(coded: Path) -> Original:
    """Return the description of the original of a coded file; reads only the header.

    Raises:
        InputError: it is not a coded file, or its header is damaged.
    """
    with coded.open("rb") as file:
        return _read_header(file, coded)


def restore_file(coded: Path, to: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Original:
    """Restore the original of a coded file bit for bit; it appears under its name only when complete and checked.

    Args:
        coded: The coded file.
        to: The restored file.
        progress: Called with the bytes done and their total.

    Raises:
        InputError: it is not a coded file, or was changed, truncated or extended.
        RequestError: the disk has not enough free space.
    """
    with coded.open("rb") as file:
        original = _read_header(file, coded)
        free = shutil.disk_usage(to.parent).free
        if free < original.size:
            raise RequestError(
                "not enough free disk space", where=to, got=f"{free:,} bytes", expected=f"{original.size:,} bytes"
            )
        done = 0
        with replacing(to) as partial, partial.open("wb") as target:
            for data in _restored_chunks(file, original, coded):
                target.write(data)
                done += len(data)
                progress(done, original.size)
            target.flush()
            os.fsync(target.fileno())
    return original


def check_file(coded: Path) -> Original:
    """Restore the original of a coded file without keeping it.

    Raises:
        InputError: as for `restore_file`.
    """
    with coded.open("rb") as file:
        original = _read_header(file, coded)
        for _ in _restored_chunks(file, original, coded):
            pass
    return original


def restored_chunks(coded: Path, workers: int | None = None) -> Iterator[memoryview]:
    """Yield the bytes of the original of a coded file in order; the whole is checked at the end.

    Args:
        coded: The coded file.
        workers: Threads; fewer take less memory. By default one per core.

    Raises:
        InputError: as for `restore_file`.
    """
    with coded.open("rb") as file:
        yield from _restored_chunks(file, _read_header(file, coded), coded, workers)


def restored(coded: Path, most_bytes: int) -> bytes:
    """Return the original of a coded file if it has at most `most_bytes`.

    Raises:
        InputError: as for `restore_file`, or it is larger.
    """
    size = original_of(coded).size
    if size > most_bytes:
        raise InputError(
            "the coded file is too large", where=coded, got=f"{size:,} bytes", expected=f"at most {most_bytes:,}"
        )
    return b"".join(restored_chunks(coded))


def _restored_chunks(
    file: BinaryIO, original: Original, coded: Path, workers: int | None = None
) -> Iterator[memoryview]:
    """Yield the restored bytes in order, chunk by chunk; the whole is checked at the end.

    Args:
        file: The coded file, positioned after its header.
        original: Its original.
        coded: Its path, for errors.
        workers: Threads; by default one per core.
    """
    whole = hashlib.sha256()

    def restore(given: tuple[int, bytes]) -> memoryview:
        size, payload = given
        try:
            return decode(payload, size).data
        except InputError as error:
            raise _damaged(coded, error) from error

    for data in on_all_cores(restore, _read_chunks(file, original.size, coded), workers):
        whole.update(data)
        yield data
    if whole.digest() != original.sha256:
        raise _damaged(coded, "another SHA-256 than the original's")


def _read_chunks(file: BinaryIO, size: int, coded: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the original size and the payload of each chunk, after checking its checksum."""
    left, before = size, MOST_CHUNK_BYTES
    while left:
        head = file.read(_CHUNK.size)
        if len(head) < _CHUNK.size:
            raise _damaged(coded, f"{left:,} bytes of the original are missing")
        count, length, checksum = _CHUNK.unpack(head)
        # The encoder fills chunks, so it never writes two small ones in a row; they would only waste time.
        small = before + count <= LEAST_CHUNK_BYTES
        if not 0 < count <= min(left, MOST_CHUNK_BYTES) or length > _MOST_PAYLOAD or small:
            raise _damaged(coded, f"a chunk of {length:,} bytes for {count:,}")
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload, zlib.crc32(head[:-4])) != checksum:
            raise _damaged(coded, "the checksum of a chunk is wrong")
        left, before = left - count, count
        yield count, payload
    if file.read(1):
        raise _damaged(coded, "bytes after the last chunk")


def on_all_cores(
    work: Callable[[_Given], _Made], given: Iterable[_Given], workers: int | None = None
) -> Iterator[_Made]:
    """Yield the results of `work` in order, with at most one more item in flight than there are workers."""
    workers = workers or available_cores()
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[_Made]] = deque()
    try:
        for one in given:
            waiting.append(pool.submit(work, one))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(parts: Iterable[Part], most: int) -> Iterator[list[Part]]:
    """Yield the parts of each chunk of at most `most` bytes."""
    group: list[Part] = []
    for part in parts:
        if group and sum(one.bytes for one in group) + part.bytes > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _read(source: BinaryIO, group: list[Part], path: Path) -> bytes:
    wanted = sum(part.bytes for part in group)
    data = source.read(wanted)
    if len(data) < wanted:
        raise InputError("the file became shorter while it was read", where=path)
    return data


def _chunk_head(size: int, payload: bytes) -> bytes:
    sizes = struct.pack("<II", size, len(payload))
    return sizes + _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(sizes)))


def _header(original: Original) -> bytes:
    name = original.name.encode()
    header = _FIXED.pack(MAGIC, VERSION, original.size, original.sha256, len(name)) + name
    return header + _CHECKSUM.pack(zlib.crc32(header))


def _read_header(file: BinaryIO, coded: Path) -> Original:
    fixed = file.read(_FIXED.size)
    if fixed[: len(MAGIC)] != MAGIC:
        raise InputError("this is no coded file", where=coded, got=f"{fixed[:8]!r} at its beginning")
    if len(fixed) < _FIXED.size:
        raise _damaged(coded, "the header ends early")
    _, version, size, sha256, length = _FIXED.unpack(fixed)
    if version != VERSION:
        raise InputError(
            "the coded file is of another version", where=coded, got=version, expected=VERSION,
            next_step="unpack it with the edge-exporter that made it",
        )  # fmt: skip
    reading = Reading(file.read(length + _CHECKSUM.size))
    try:
        name = reading.take(length)
        (checksum,) = reading.unpack("I")
    except InputError as error:
        raise _damaged(coded, error) from error
    if zlib.crc32(fixed + name) != checksum:
        raise _damaged(coded, "the checksum of the header is wrong")
    most = max(UNSUSPECTED_BYTES, MOST_RATIO * os.fstat(file.fileno()).st_size)
    if size > most:
        raise InputError(
            "the coded file claims to stand for more than any model does", where=coded, got=f"{size:,} bytes",
            expected=f"at most {most:,} bytes", next_step="get it from somebody whom you trust",
        )  # fmt: skip
    return Original(_plain_name(name, coded), size, sha256)


def _plain_name(stored: bytes, coded: Path) -> str:
    """Return the original's name, which must not point outside the folder it is restored to."""
    name = stored.decode("utf-8", errors="replace")
    plain = PurePosixPath(name).name == name and PureWindowsPath(name).name == name
    if not plain or name in ("", ".", "..") or not name.isprintable():
        raise InputError("the coded file names a file outside the folder", where=coded, got=repr(name))
    return name


def _damaged(coded: Path, what: object) -> InputError:
    return InputError("the coded file is damaged", where=coded, got=what, next_step="fetch it again")
