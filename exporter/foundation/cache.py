"""The cache folder, and the temporary files and folders of a job: each has a living owner, or is swept.

What a process is making is noted in the cache under `held`, in a file that the process keeps locked. The system takes
the lock away when the process dies, however it dies; the next one that makes anything then finds the note without a
lock and removes what it names.
"""

import errno
import fcntl
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

# The kinds of entries. A process that holds the lock of one may wait only for one of a later kind, so that no two
# processes ever wait for each other.
KINDS = (
    "gguf", "texts", "samples", "statistics", "pruned", "policies", "references", "arm64", "templates", "vocabularies",
)  # fmt: skip
HELD = "held"
# The name of a folder where temporary files go.
SCRATCH = "edge-exporter"
ELSEWHERE = "free some space, or choose another place"
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than the disk or a limit (ulimit -f) allows",
}
# What numpy says, which does not tell the reason.
PART_WRITTEN = re.compile(r"\d+ requested and \d+ written")

_locked = threading.local()
_waiting: ContextVar[Callable[[], None]] = ContextVar("_waiting", default=lambda: None)


def cache_folder(*parts: str) -> Path:
    """Return (and make) a folder of the cache: `$EDGE_EXPORTER_CACHE`, or the user's cache folder.

    Only its owner can enter it: it holds what was computed from the user's texts.

    Raises:
        RequestError: it cannot be made, belongs to another user, or others can write to it.
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
    if found.st_uid != os.geteuid():
        raise RequestError(
            "the cache folder belongs to another user",
            where=folder,
            got=f"user {found.st_uid}",
            expected=f"user {os.geteuid()}",
            next_step="name another in EDGE_EXPORTER_CACHE",
        )
    if found.st_mode & 0o022:
        raise RequestError(
            "others can write to the cache folder",
            where=folder,
            got=f"mode {found.st_mode & 0o7777:o}",
            next_step="take that right away (chmod go-w), or name another in EDGE_EXPORTER_CACHE",
        )


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
def locked(entry: Path) -> Iterator[None]:
    """Hold the lock of an entry of the cache; where another process holds it, wait until that has ended.

    Args:
        entry: The file or folder below the folder of one of `KINDS`.
    """
    kind, *names = entry.relative_to(cache_folder()).parts
    before: list[str] = vars(_locked).setdefault("kinds", [])
    assert all(KINDS.index(kind) > KINDS.index(one) for one in before), f"{kind} after {before}: may wait for ever"
    with _lock(cache_folder(HELD) / "-".join((kind, *names)), _waiting.get()):
        before.append(kind)
        try:
            yield
        finally:
            before.remove(kind)


@contextmanager
def telling(waiting: Callable[[], None]) -> Iterator[None]:
    """Within the block, call a function when this job begins to wait for another that makes the same entry."""
    token = _waiting.set(waiting)
    try:
        yield
    finally:
        _waiting.reset(token)


@contextmanager
def _lock(file: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Lock a file that is there only as long as it is locked, and give its descriptor."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever had it may have removed it in the meantime.
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
    """Give a path in a folder that nothing has; what is made there goes, at the latest when the next process begins.

    Where the cache cannot take a note of it, what is made there stays when this process is killed.
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
    """Remove what dead processes left.

    Args:
        held: The folder of notes.
    """
    for note in held.iterdir():
        # A living process holds the lock, or another one that sweeps was faster.
        with suppress(OSError), note.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left = Path(os.fsdecode(file.read()))
            # A damaged note must not name what is not ours.
            ours = left.name.endswith(f".partial-{note.name}") and os.path.lexists(left)
            if ours and left.lstat().st_uid == os.geteuid():
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
    """Give a temporary path beside `path` to write to; it takes the name when all went well, else it goes.

    Args:
        path: Where the file will stand.
        mode: Who may use it, before the umask.

    Raises:
        RequestError: the disk is full.
    """
    with _temporary(path.parent, path.name) as temporary, naming_disk(path.parent):
        temporary.touch(mode, exist_ok=False)
        yield temporary
        temporary.replace(path)


@contextmanager
def scratch_folder(parent: Path | None = None, name: str = SCRATCH, mode: int = 0o700) -> Iterator[Path]:
    """Give a new folder that goes at the end, unless it was given another name.

    Args:
        parent: Where; None for where temporary files go.
        name: What it will be, for whoever finds it.
        mode: Who may use it, before the umask.

    Raises:
        RequestError: the disk is full.
    """
    parent = parent or Path(tempfile.gettempdir())
    with _temporary(parent, name) as folder, naming_disk(parent):
        folder.mkdir(mode)
        yield folder


@contextmanager
def naming_disk(folder: Path) -> Iterator[None]:
    """Turn what any library says of a full disk while it writes into a folder into one sentence that names the disk.

    Raises:
        RequestError: see above.
    """
    try:
        yield
    except Exception as error:
        # A child process hands on in words what it met.
        ours = isinstance(error, ExporterError) and not isinstance(error, RuntimeCrashError)
        what = None if ours or not concerns(error, folder) else full_disk(error)
        if what is None:
            raise
        raise RequestError(what, where=folder, got=disk_of(folder), next_step=_next_step(folder)) from error


def full_disk(error: Exception) -> str | None:
    """Return what to say where an error means that the disk takes no more, else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return FULL.get(error.errno)
    # Libraries in other languages hand on the system's words.
    said = str(error)
    named = next((what for number, what in FULL.items() if os.strerror(number) in said), None)
    return named or (f"the disk took only a part of a file ({said})" if PART_WRITTEN.search(said) else None)


def concerns(error: Exception, folder: Path) -> bool:
    """Return whether an error may come from below a folder; a failed write names no file."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        return named is None
    return Path(named).absolute().is_relative_to(folder.absolute())


def disk_of(path: Path) -> str:
    """Return the disk of a path in words: where it is mounted, and what is free."""
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
