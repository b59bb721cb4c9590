"""The cache folder, and the temporary files and folders of a job, which are removed once their owner is dead.

A process records each temporary path in a note in the cache under `held`, and keeps the note locked. The system
releases the lock when the process dies, however it dies. The next process that creates anything finds the unlocked note
and removes the path it names.
"""

import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from exporter.foundation.errors import ExporterError, RequestError, RuntimeCrashError
from exporter.foundation.systems import lock, user

# The kinds of entries. A process that holds the lock of one kind may wait only for a later kind, which prevents
# deadlocks.
KINDS = (
    "packages", "gguf", "adapted", "texts", "samples", "statistics", "pruned", "policies", "references", "arm64",
    "kernels", "templates", "vocabularies",
)  # fmt: skip
HELD = "held"
# Default name of a scratch folder.
SCRATCH = "edge-exporter"
ELSEWHERE = "free some space, or choose another place"
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the disk or a limit (ulimit -f) allows",
}
# numpy's message, which does not give the reason.
PART_WRITTEN = re.compile(r"\d+ requested and \d+ written")

_locked = threading.local()
_waiting: ContextVar[Callable[[], None]] = ContextVar("_waiting", default=lambda: None)


def cache_folder(*parts: str) -> Path:
    """Return a folder of the cache, `$EDGE_EXPORTER_CACHE` or the user's cache folder; create it if necessary.

    Only its owner can enter it, since it holds results computed from the user's texts.

    Raises:
        RequestError: it cannot be created, belongs to another user, or others can write to it.
    """
    folder = _root()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        for part in parts:
            folder /= part
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            if folder.stat().st_mode & 0o777 != 0o700:
                folder.chmod(0o700)
    except OSError as error:
        raise RequestError(
            "the cache folder cannot be made",
            where=folder,
            got=error.strerror,
            next_step="name another in EDGE_EXPORTER_CACHE",
        ) from error
    return folder


def _root() -> Path:
    named = os.environ.get("EDGE_EXPORTER_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "edge-exporter")


def _require_own(folder: Path) -> None:
    found = folder.stat()
    if user() not in (None, found.st_uid):
        raise RequestError(
            "the cache folder belongs to another user",
            where=folder,
            got=f"user {found.st_uid}",
            expected=f"user {user()}",
            next_step="name another in EDGE_EXPORTER_CACHE",
        )
    if user() is not None and found.st_mode & 0o022:
        raise RequestError(
            "others can write to the cache folder",
            where=folder,
            got=f"mode {found.st_mode & 0o7777:o}",
            next_step="take that right away (chmod go-w), or name another in EDGE_EXPORTER_CACHE",
        )


def require_space(folder: Path, need_bytes: int, next_step: str) -> None:
    """Check that a folder's disk has enough free space.

    Raises:
        RequestError: it has less; `next_step` says what to do.
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
def locked(entry: Path) -> Iterator[None]:
    """Hold the lock of a cache entry; wait while another process holds it.

    Args:
        entry: The file or folder, below the folder of one of `KINDS`.
    """
    kind, *names = entry.relative_to(cache_folder()).parts
    place = KINDS.index(kind), "/".join(names)
    before: list[tuple[int, str]] = vars(_locked).setdefault("places", [])
    assert all(place > one for one in before), f"{entry} after {before}: may wait for ever"
    with _lock(cache_folder(HELD) / "-".join((kind, *names)), _waiting.get()):
        before.append(place)
        try:
            yield
        finally:
            before.remove(place)


@contextmanager
def telling(waiting: Callable[[], None]) -> Iterator[None]:
    """Within the block, call a function when this job starts to wait for another job that makes the same entry."""
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)


@contextmanager
def _lock(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Lock a file that exists only while it is locked, and yield its descriptor."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                lock(descriptor, wait=False)
            except BlockingIOError:
                waiting()
                lock(descriptor, wait=True)
            # The previous holder may have removed it in the meantime.
            if _is_at(descriptor, file):
                try:
                    yield descriptor
                finally:
                    file.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[Path]:
    """Yield an unused path in a folder, and remove it afterwards, at the latest when the next process starts.

    If the note cannot be written to the cache, the path remains when this process is killed.
    """
    token = secrets.token_hex(4)
    path = folder.absolute() / f".{name}.partial-{token}"
    with ExitStack() as opened:
        with suppress(RequestError, OSError):
            held = cache_folder(HELD)
            sweep(held)
            os.write(opened.enter_context(_lock(held / token)), os.fsencode(path))
        try:
            yield path
        finally:
            _remove(path)


def sweep(held: Path) -> None:
    """Remove the temporary paths of dead processes.

    Args:
        held: The folder of notes.
    """
    for note in held.iterdir():
        # An error means that a living process holds the lock, or that another sweep was faster.
        with suppress(OSError), note.open("rb") as file:
            lock(file.fileno(), wait=False)
            left = Path(os.fsdecode(file.read()))
            # A damaged note could name a foreign path.
            ours = left.name.endswith(f".partial-{note.name}") and os.path.lexists(left)
            if ours and user() in (None, left.lstat().st_uid):
                _remove(left)
            if not (ours and os.path.lexists(left)):
                note.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; it is renamed on success and removed otherwise.

    Args:
        path: Final path of the file.
        mode: Permissions before the umask.

    Raises:
        RequestError: the disk is full.
    """
    with _temporary(path.parent, path.name) as temporary, naming_disk(path.parent):
        temporary.touch(mode, exist_ok=False)
        yield temporary
        temporary.replace(path)


@contextmanager
def scratch_folder(parent: Path | None = None, name: str = SCRATCH, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder, and remove it at the end unless it was renamed.

    Args:
        parent: Parent folder; None for the default of temporary files.
        name: Part of its name, for people who find it.
        mode: Permissions before the umask.

    Raises:
        RequestError: the disk is full.
    """
    parent = parent or Path(tempfile.gettempdir())
    with _temporary(parent, name) as folder, naming_disk(parent):
        folder.mkdir(mode)
        yield folder


@contextmanager
def naming_disk(folder: Path) -> Iterator[None]:
    """Turn any library's error about a full disk, raised while writing into a folder, into one that names the disk.

    Raises:
        RequestError: see above.
    """
    try:
        yield
    except Exception as error:
        # A RuntimeCrashError may repeat such an error of a child process in its text.
        ours = isinstance(error, ExporterError) and not isinstance(error, RuntimeCrashError)
        what = None if ours or not concerns(error, folder) else full_disk(error)
        if what is None:
            raise
        raise RequestError(what, where=folder, got=disk_of(folder), next_step=_next_step(folder)) from error


def full_disk(error: Exception) -> str | None:
    """Return a description if an error means that the disk is full, else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return FULL.get(error.errno)
    # Libraries in other languages pass on the system's message.
    said = str(error)
    named = next((what for number, what in FULL.items() if os.strerror(number) in said), None)
    return named or (f"the disk took only a part of a file ({said})" if PART_WRITTEN.search(said) else None)


def concerns(error: Exception, folder: Path) -> bool:
    """Return whether an error may concern a path below a folder; a failed write names no file."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        return named is None
    return Path(named).absolute().is_relative_to(folder.absolute())


def disk_of(path: Path) -> str:
    """Describe the disk of a path: its mount point and free space."""
    place = path.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    while not place.is_mount():
        place = place.parent
    return f"{free:,} bytes free on the disk at {place}"


def _next_step(folder: Path) -> str:
    folder, temporary = folder.absolute(), Path(tempfile.gettempdir()).absolute()
    name = ""
    if folder.is_relative_to(_root().absolute()):
        name = "EDGE_EXPORTER_CACHE"
    elif folder == temporary or any(one.parent == temporary and _is_scratch(one) for one in (folder, *folder.parents)):
        name = "TMPDIR"
    return f"free some space, or name a folder on another disk in {name}" if name else ELSEWHERE


def _is_scratch(folder: Path) -> bool:
    return folder.name.startswith(f".{SCRATCH}.partial-")
