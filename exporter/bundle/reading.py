"""Reads the documents of a bundle as untrusted: follows no link, opens only regular files, bounds sizes."""

import errno
import os
import stat
from pathlib import Path
from typing import TypeVar

from exporter.bundle.manifest import MANIFEST, MEASUREMENTS, PLAN, REPORT, SELFTEST, Manifest
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import Document, from_json
from exporter.foundation.systems import READ_SAFELY
from exporter.report.data import to_json

# The report on a model of 126 layers has 0.5 MB, the other documents a few thousand bytes.
MOST_BYTES = {MANIFEST: 1 << 20, PLAN: 8 << 20, REPORT: 4 << 20, MEASUREMENTS: 1 << 20, SELFTEST: 1 << 16}
# For a link the system reports a loop, for a socket a missing device.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
D = TypeVar("D", bound=Document)


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of a bundle.

    Raises:
        InputError: it is missing, too large, or not of the schema, names a path that is not strictly below the bundle,
            or is not spelled as this tool spells it.
    """
    path = bundle / MANIFEST
    text = _bytes(path, MOST_BYTES[MANIFEST])
    manifest = from_json(Manifest, text, path)
    # Only one spelling is accepted: no key is given twice, and no two programs can read it differently.
    if to_json(manifest).encode() != text:
        raise InputError("the manifest was changed after it was written", where=path, next_step="get the bundle again")
    return manifest


def read_document(bundle: Path, name: str, kind: type[D]) -> D:
    """Read another document of a bundle.

    Raises:
        InputError: it is missing, too large, or not of the kind's schema.
    """
    return from_json(kind, _bytes(bundle / name, MOST_BYTES[name]), bundle / name)


def _bytes(path: Path, most_bytes: int) -> bytes:
    try:
        # Without O_NONBLOCK, a pipe would wait for a writer.
        handle = os.open(path, READ_SAFELY)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise no_such_file(path)
            if found.st_size > most_bytes:
                raise InputError(
                    "the document is too large",
                    where=path,
                    got=f"{found.st_size:,} bytes",
                    expected=f"at most {most_bytes:,} bytes",
                )
            return file.read(most_bytes)
    except OSError as error:
        if error.errno in NO_FILE:
            raise no_such_file(path) from error
        raise unreadable(path, error) from error


def no_such_file(path: Path) -> InputError:
    """Return the error for a file that a bundle lacks, or that is something else."""
    return InputError("no such file", where=path, next_step="check that the path is a complete bundle")


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a part of a bundle that the system cannot read."""
    return InputError("cannot be read", where=path, got=error.strerror, next_step="check its permissions and the disk")
