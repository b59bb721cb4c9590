"""What one operating system has and another lacks: file locks, flags of `open`, owners, limits of a process."""

import importlib
import os
from typing import Any


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


_fcntl, _msvcrt, _resource = map(_module, ("fcntl", "msvcrt", "resource"))
# Of a file that someone else may have put in place: follow no link, and do not wait for the writer of a pipe.
READ_SAFELY = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def lock(descriptor: int, wait: bool) -> None:
    """Lock a file until its descriptor is closed. Systems with neither `flock` nor Windows' locks lock nothing.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    if _fcntl is not None:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
        return
    while _msvcrt is not None:
        try:
            # LK_LOCK gives up after ten seconds.
            _msvcrt.locking(descriptor, _msvcrt.LK_LOCK if wait else _msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from error


def user() -> int | None:
    """Return this user's number; None where users have none."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def limit_process(name: str, soft: int, hard: int | None = None) -> None:
    """Lower a limit of this process, such as `RLIMIT_CORE`; systems without such limits set none.

    Args:
        name: The limit.
        soft: The new value.
        hard: The value that it may be raised to again; None for the same.

    Raises:
        OSError: the system refuses.
        ValueError: the limit was lower.
    """
    if _resource is not None:
        _resource.setrlimit(getattr(_resource, name), (soft, soft if hard is None else hard))


def process_limits(name: str) -> tuple[int, ...]:
    """Return the limits of this process by a name that are not unlimited, soft and hard."""
    if _resource is None:
        return ()
    return tuple(one for one in _resource.getrlimit(getattr(_resource, name)) if one != _resource.RLIM_INFINITY)


def hard_limit(name: str) -> int:
    """Return the hard limit of this process by a name, as the system writes it; 0 where there are no limits."""
    return 0 if _resource is None else int(_resource.getrlimit(getattr(_resource, name))[1])


def peak_memory() -> int:
    """Return the largest resident set of this process by `getrusage`: in KiB, on macOS in bytes; 0 without it."""
    return 0 if _resource is None else int(_resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss)
