"""Folders that only this user can read, and that are gone with the process that made them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MAKING, MADE = "edge-exporter-making-", "edge-exporter-private-"


@contextmanager
def private_folder() -> Iterator[Path]:
    """Give an empty folder of mode 0700, and remove it at the end; what killed processes left goes first."""
    parent = Path(tempfile.gettempdir()).resolve()
    _sweep(parent)
    making = Path(tempfile.mkdtemp(prefix=MAKING, dir=parent))
    folder = making.with_name(making.name.replace(MAKING, MADE))
    handle = os.open(making, os.O_RDONLY)
    try:
        # The lock ends with this process, however that ends. It is there before the name by which it is swept.
        fcntl.flock(handle, fcntl.LOCK_EX)
        making.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep(parent: Path) -> None:
    """Remove the private folders of this user that no process holds."""
    for folder in parent.glob(f"{MADE}*"):
        with suppress(OSError):
            _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid == os.getuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    finally:
        os.close(handle)
