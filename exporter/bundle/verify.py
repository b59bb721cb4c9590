"""Check a bundle offline: every byte against the manifest, and the documents against their schemas.

A bundle is hostile until checked: nothing outside its folder is opened, no link is followed, sizes are bounded.
"""

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from exporter.bundle.manifest import (
    MANIFEST,
    MEASUREMENTS,
    REPORT,
    UNLISTED,
    FileEntry,
    Manifest,
    content_digest,
    files_below,
    sha256_of,
    standing_for,
)
from exporter.coding.container import check_file, original_of
from exporter.errors import InputError
from exporter.measures import Check
from exporter.report.data import Measurements, Report, from_json, to_json

MAX_DOCUMENT_BYTES = 64 << 20
Progress = Callable[[int, int], None]


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of a bundle.

    Raises:
        InputError: there is none, or it is too large, not of the schema, names a path that is not strictly below
            the bundle, or is not spelled as this tool spells it.
    """
    path = bundle / MANIFEST
    text = _read(path)
    manifest = from_json(Manifest, text, path)
    # One spelling only: no key is given twice, and no two programs can read it differently.
    if to_json(manifest).encode() != text:
        raise InputError("the manifest was changed after it was written", where=path, next_step="get the bundle again")
    return manifest


def _read(path: Path) -> bytes:
    """Return the bytes of a document of a bundle."""
    if path.is_symlink() or not path.is_file():
        raise InputError("no such file", where=path, next_step="check that the path is a complete bundle")
    try:
        size = path.stat().st_size
        if size > MAX_DOCUMENT_BYTES:
            raise InputError(
                "the document is too large",
                where=path,
                got=f"{size:,} bytes",
                expected=f"at most {MAX_DOCUMENT_BYTES:,} bytes",
            )
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError("cannot be read", where=path, got=error.strerror, next_step="check its permissions and the disk")


def verify_bundle(bundle: Path, progress: Progress | None = None) -> list[Check]:
    """Check a bundle: every listed file, plain or coded, nothing unlisted, no links, content digest and documents.

    Args:
        bundle: Folder of the bundle; nothing in it is changed.
        progress: Called with the bytes read so far and the bytes to read.

    Returns:
        A check for each listed file, and for what a coded one restores to, then those of the whole bundle; all passed
        only if every byte is as listed.

    Raises:
        InputError: the manifest, or a folder, cannot be read.
    """
    manifest = read_manifest(bundle)
    try:
        present, strange = files_below(bundle)
    except OSError as error:
        raise _unreadable(bundle, error) from error
    return [
        *_check_files(bundle, manifest.files, frozenset(present), progress),
        _check_unlisted(manifest, present),
        _check_no_links(strange),
        _check_content_digest(manifest),
        _check_report(bundle, manifest),
        _check_measurements(bundle),
    ]


def _check_files(
    bundle: Path, files: Iterable[FileEntry], present: frozenset[str], progress: Progress | None
) -> Iterable[Check]:
    entries = [(entry, standing_for(entry, present)) for entry in files]
    total = sum(standing.size for _, standing in entries)
    done = 0

    def advance(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        if progress is not None:
            progress(done, total)

    for entry, standing in entries:
        check = _check_file(bundle, standing, standing.path in present, advance)
        yield check
        if standing is not entry and check.status == "passed":
            yield _check_restored(bundle, standing, entry)


def _check_restored(bundle: Path, coded: FileEntry, entry: FileEntry) -> Check:
    """Restore a coded file, without keeping it, and compare it with what is listed."""
    name = f"file {entry.path}"
    try:
        stated = original_of(bundle / coded.path)
        if (stated.name, stated.size) != (PurePosixPath(entry.path).name, entry.size):
            return _check(name, f"its coded form is that of {stated.name!r}, {stated.size:,} bytes")
        digest = check_file(bundle / coded.path).sha256.hex()
    except InputError as error:
        return _check(name, str(error))
    except OSError as error:
        return _check(name, f"its coded form cannot be read: {error.strerror}")
    wrong = "" if digest == entry.sha256 else f"it restores to SHA-256 {digest}, expected {entry.sha256}"
    return _check(name, wrong, passed=f"{entry.size:,} bytes when restored, SHA-256 {digest}")


def _check_file(bundle: Path, entry: FileEntry, present: bool, advance: Callable[[int], None]) -> Check:
    name, path = f"file {entry.path}", bundle / entry.path
    if not present:
        return _check(name, "the file is missing", f"expected {entry.size:,} bytes")
    try:
        size = path.stat().st_size
        if size != entry.size:
            return Check(
                name=name,
                status="failed",
                detail=f"the file is cut short or was changed: got {size:,} bytes, expected {entry.size:,} bytes",
                value=size,
                limit=entry.size,
                unit="bytes",
            )
        _, digest = sha256_of(path, advance)
    except OSError as error:
        return _check(name, f"cannot be read: {error.strerror}")
    wrong = "" if digest == entry.sha256 else f"the bytes were changed: got SHA-256 {digest}, expected {entry.sha256}"
    return _check(name, wrong, passed=f"{entry.size:,} bytes, SHA-256 {digest}")


def _check(name: str, wrong: str, more: str = "", passed: str = "") -> Check:
    """Return a check that failed if something is wrong."""
    if wrong:
        return Check(name=name, status="failed", detail=f"{wrong}: {more}" if more else wrong)
    return Check(name=name, status="passed", detail=passed)


def _check_unlisted(manifest: Manifest, present: list[str]) -> Check:
    extra = set(present) - {standing_for(entry, present).path for entry in manifest.files} - UNLISTED
    wrong = "files that the manifest does not list" if extra else ""
    return _check("no unlisted file", wrong, _some(extra), passed="every file is listed")


def _check_no_links(strange: list[str]) -> Check:
    wrong = "neither files nor folders" if strange else ""
    return _check("no links", wrong, _some(strange), passed="only files and folders")


def _some(paths: Iterable[str]) -> str:
    ordered = sorted(paths)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _check_content_digest(manifest: Manifest) -> Check:
    digest = content_digest(manifest, manifest.files)
    wrong = "" if digest == manifest.content_digest else "the manifest was changed"
    return _check("content digest", wrong, f"got {digest}, expected {manifest.content_digest}", passed=digest)


def _check_report(bundle: Path, manifest: Manifest) -> Check:
    try:
        report = from_json(Report, _read(bundle / REPORT), REPORT)
    except InputError as error:
        return _check(REPORT, str(error))
    same = (report.device, report.target, report.recipe) == (manifest.device, manifest.target, manifest.recipe)
    wrong = "" if same else "it reports on another device, target or recipe than the manifest's"
    return _check(REPORT, wrong, passed=f"{len(report.checks)} checks, {len(report.tensors)} tensors")


def _check_measurements(bundle: Path) -> Check:
    try:
        measurements = from_json(Measurements, _read(bundle / MEASUREMENTS), MEASUREMENTS)
    except InputError as error:
        return _check(MEASUREMENTS, str(error))
    return _check(MEASUREMENTS, "", passed=f"made {measurements.created}")
