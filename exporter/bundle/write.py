"""Writes a bundle: stages it next to its final place, lists every byte, then renames it in one step."""

import errno
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.bundle.manifest import (
    LICENCES,
    MANIFEST,
    CodedForm,
    FileEntry,
    Manifest,
    ManifestHeader,
    files_below,
    sha256_of,
)
from exporter.coding.container import SUFFIX
from exporter.foundation.cache import concerns, naming_disk, replacing, require_space, scratch_folder
from exporter.foundation.errors import ExporterError, RequestError
from exporter.report.data import to_json

REFUSALS = {
    # Another job may have made the output while this one ran.
    errno.ENOTEMPTY: ("already exists", "choose another -o or delete it"),
    errno.EACCES: ("no permission to write", "choose another -o"),
    errno.EPERM: ("no permission to write", "choose another -o"),
    errno.EROFS: ("the file system is read-only", "choose another -o"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter -o"),
}


@contextmanager
def staging_folder(output: Path, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a new folder next to `output`, on its file system, and remove what is left of it at the end.

    However the block ends (Ctrl-C included), nothing half-written stays. If the process is killed, the next run removes
    the rest. `write_bundle` moves the folder away when it is complete.

    Args:
        output: Path of the bundle; must not exist.
        need_bytes: Free disk space that the job needs.

    Raises:
        RequestError: `output` exists, its parent does not exist or cannot be written, or the disk is too full.
    """
    _refuse_existing(output)
    if not output.parent.is_dir():
        raise RequestError(
            "the folder that is to hold the bundle does not exist",
            where=output.parent,
            next_step="create it or choose another -o",
        )
    require_space(output.parent, need_bytes, "free some space or choose another -o")
    # The finished bundle keeps the mode.
    with _refusing(output), scratch_folder(output.parent, output.name, 0o777) as folder:
        yield folder


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise RequestError("already exists", where=path, next_step="choose another -o or delete it")


@contextmanager
def _refusing(output: Path) -> Iterator[None]:
    """Turn errors of the file system below the parent of `output` into a `RequestError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS or not concerns(error, output.parent):
            raise
        what, next_step = REFUSALS[error.errno]
        raise RequestError(what, where=output, next_step=next_step) from error


def write_licences(staging: Path, files: Iterable[Path]) -> None:
    """Copy the files that state the terms of the model into a staged folder."""
    for path in files:
        (staging / LICENCES).mkdir(exist_ok=True)
        shutil.copyfile(path, staging / LICENCES / path.name)


def write_bundle(staging: Path, output: Path, header: ManifestHeader) -> Manifest:
    """Add the manifest to a staged folder and give the folder its final name in one step.

    Args:
        staging: Folder on the file system of `output` that holds all files but the manifest; it is moved. A file with
            its coded form next to it is listed with both and then deleted.
        output: Path of the bundle; must not exist.
        header: Content of the manifest apart from the files.

    Returns:
        The manifest as written.

    Raises:
        RequestError: `output` exists, or the file system refuses to write.
        ExporterError: the folder holds something that is neither a file nor a folder.
    """
    _refuse_existing(output)
    with _refusing(output), naming_disk(output.parent):
        manifest = Manifest.of(header, _entries(staging))
        (staging / MANIFEST).write_text(to_json(manifest), encoding="utf-8", newline="\n")
        for entry in manifest.files:
            if entry.coded is not None:
                (staging / entry.path).unlink()
    move_into_place(staging, output)
    return manifest


def move_into_place(staging: Path, output: Path) -> None:
    """Give a complete staged folder its final name in one step.

    Raises:
        RequestError: `output` exists, or the file system refuses to write.
    """
    _refuse_existing(output)
    with _refusing(output), naming_disk(output.parent):
        _sync(staging)
        staging.rename(output)
        _sync_one(output.parent)


def _entries(folder: Path) -> list[FileEntry]:
    entries, listed = [], _only_files(folder)
    paths = frozenset(listed)
    for path in listed:
        if path.endswith(SUFFIX) and path.removesuffix(SUFFIX) in paths:
            continue
        coded = None
        if path + SUFFIX in paths:
            size, digest = sha256_of(folder / (path + SUFFIX))
            coded = CodedForm(size=size, sha256=digest)
        size, digest = sha256_of(folder / path)
        entries.append(FileEntry.of(path, size, digest, coded))
    return entries


def _only_files(folder: Path) -> list[str]:
    paths, strange = files_below(folder)
    if strange:
        raise ExporterError(
            "neither a file nor a folder", where=folder / strange[0], next_step="give a folder of plain files"
        )
    return paths


def _sync(folder: Path) -> None:
    """Force a folder's files and names to the disk, so that a power cut cannot leave a bundle with holes."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_one(Path(parent, name))
        _sync_one(Path(parent))


def _sync_one(path: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder, and flushes written data at close
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tar(bundle: Path, tar: Path) -> None:
    """Pack a bundle's folder, under its own name, into a tar file that is the same for the same bundle.

    Raises:
        RequestError: `tar` exists or lies inside the bundle, or the file system refuses to write.
        ExporterError: the bundle holds something that is neither a file nor a folder.
    """
    _refuse_existing(tar)
    if tar.absolute().is_relative_to(bundle.absolute()):
        raise RequestError("lies inside the bundle it is to hold", where=tar, next_step="choose a place beside it")
    with _refusing(tar), replacing(tar) as partial:
        _pack(bundle, partial)
        _sync_one(partial)


def _pack(bundle: Path, tar: Path) -> None:
    name = bundle.absolute().name
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in _only_files(bundle):
            # A new TarInfo has no owner, mode 644 and time 0: it holds nothing of this machine.
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = (bundle / path).stat().st_size
            with (bundle / path).open("rb") as file:
                archive.addfile(member, file)
