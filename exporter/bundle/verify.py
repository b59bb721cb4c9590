"""Checks a bundle offline: every byte against the manifest, and the documents against their schemas.

A bundle is untrusted until checked: nothing outside its folder is opened, no link is followed, sizes are bounded.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from exporter.bundle.manifest import (
    MEASUREMENTS,
    PLAN,
    REPORT,
    REPORT_PAGE,
    SELFTEST,
    UNLISTED,
    FileEntry,
    Manifest,
    content_digest,
    evidence_digest,
    files_below,
    sha256_of,
    standing_for,
)
from exporter.bundle.opening import Shipped, admitted, require_original, shipped
from exporter.bundle.reading import read_document, read_manifest, unreadable
from exporter.coding.container import check_file
from exporter.foundation.errors import ExporterError, InputError
from exporter.foundation.quantities import Check, Document
from exporter.planning.plan import Plan
from exporter.prove.self_test import SelfTest
from exporter.report.data import Measurements, Report, agree, disagreements

# Name of the check of the files that a runtime is given.
MODEL = "model"
NOT_WHOLE = Check(name=MODEL, status="not run", detail="not every file is as it is listed")
D = TypeVar("D", bound=Document)

Progress = Callable[[int, int], None]


def verify_bundle(bundle: Path, progress: Progress | None = None) -> list[Check]:
    """Check a bundle: every listed file, plain or coded, nothing unlisted, no links, digests, documents, settings.

    Args:
        bundle: Folder of the bundle; nothing in it is changed.
        progress: Called with the bytes read so far and the bytes to read.

    Returns:
        A check for each listed file, and for the restored form of a coded one, then those of the whole bundle; all
        passed only if every byte is as listed.

    Raises:
        InputError: the manifest, or a folder, cannot be read.
    """
    manifest = read_manifest(bundle)
    try:
        present, strange = files_below(bundle)
    except OSError as error:
        raise unreadable(bundle, error) from error
    there = frozenset(present)
    files = list(_check_files(bundle, manifest.files, there, progress))
    whole = all(check.status == "passed" for check in files)
    return [
        *files,
        _check_unlisted(manifest, there),
        _check_no_links(strange),
        *_check_digests(manifest),
        *_check_documents(bundle, manifest),
        _check_model(bundle, manifest) if whole else NOT_WHOLE,
    ]


def _check_files(
    bundle: Path, files: Iterable[FileEntry], present: frozenset[str], progress: Progress | None
) -> Iterable[Check]:
    shipped = [Shipped(entry, standing_for(entry, present)) for entry in files]
    total = sum(file.standing.size for file in shipped)
    done = 0

    def advance(read_bytes: int) -> None:
        nonlocal done
        done += read_bytes
        if progress is not None:
            progress(done, total)

    for file in shipped:
        check = _check_file(bundle, file.standing, file.standing.path in present, advance)
        yield check
        if file.coded and check.status == "passed":
            yield _check_restored(bundle, file)


def _check_restored(bundle: Path, file: Shipped) -> Check:
    """Restore a coded file, without keeping it, and compare it with the listed file."""
    entry = file.entry
    name = f"file {entry.path}"
    try:
        require_original(bundle, file)
        digest = check_file(bundle / file.standing.path).sha256.hex()
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
    """Return a check that fails if `wrong` is not empty."""
    if wrong:
        return Check(name=name, status="failed", detail=f"{wrong}: {more}" if more else wrong)
    return Check(name=name, status="passed", detail=passed)


def _check_unlisted(manifest: Manifest, present: frozenset[str]) -> Check:
    extra = present - {standing_for(entry, present).path for entry in manifest.files} - UNLISTED
    wrong = "files that the manifest does not list" if extra else ""
    return _check("no unlisted file", wrong, _some(extra), passed="every file is listed")


def _check_no_links(strange: list[str]) -> Check:
    wrong = "neither files nor folders" if strange else ""
    return _check("no links", wrong, _some(strange), passed="only files and folders")


def _some(paths: Iterable[str]) -> str:
    ordered = sorted(paths)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _check_digests(manifest: Manifest) -> list[Check]:
    version = manifest.schema_version
    note = "" if version > 1 else f"; {MEASUREMENTS} and {REPORT_PAGE} are under no digest in schema version 1"
    content = content_digest(manifest, manifest.files, version)
    checks = [_check_digest("content digest", content, manifest.content_digest, note)]
    if manifest.evidence_digest is not None:
        evidence = evidence_digest(manifest.files)
        checks.append(_check_digest("evidence digest", evidence, manifest.evidence_digest))
    return checks


def _check_digest(name: str, digest: str, expected: str, note: str = "") -> Check:
    wrong = "" if digest == expected else "the manifest was changed"
    return _check(name, wrong, f"got {digest}, expected {expected}", passed=digest + note)


def _check_documents(bundle: Path, manifest: Manifest) -> list[Check]:
    plan, of_plan = _read(bundle, PLAN, Plan)
    report, of_report = _read(bundle, REPORT, Report)
    measurements, of_measurements = _read(bundle, MEASUREMENTS, Measurements)
    _, of_self_test = _read(bundle, SELFTEST, SelfTest)
    if report is not None:
        same = (report.device, report.target, report.recipe) == (manifest.device, manifest.target, manifest.recipe)
        wrong = "" if same else "it reports on another device, target or recipe than the manifest's"
        of_report = _check(REPORT, wrong, passed=f"{len(report.checks)} checks, {len(report.tensors)} tensors")
    if plan is not None and report is not None:
        wrong = "" if agree(plan, report) else f"it is not the plan of what {REPORT} reports on"
        of_plan = _check(PLAN, wrong, passed=f"it decides {len(plan.matrices)} matrices of {REPORT}")
    if report is not None and measurements is not None:
        differing = disagreements(report, measurements)
        wrong = f"it does not agree with {REPORT}" if differing else ""
        of_measurements = _check(MEASUREMENTS, wrong, _some(differing), passed=f"made {measurements.created}")
    # Version 0.1.0 wrote no plan.
    planned = [of_plan] if manifest.schema_version > 1 else []
    return [*planned, of_report, of_measurements, of_self_test]


def _read(bundle: Path, name: str, kind: type[D]) -> tuple[D | None, Check]:
    try:
        return read_document(bundle, name, kind), _check(name, "", passed="of its schema")
    except InputError as error:
        return None, _check(name, str(error))


def _check_model(bundle: Path, manifest: Manifest) -> Check:
    """Check that the model's files ask a runtime for nothing that this tool's own do not."""
    try:
        with admitted(bundle, manifest, shipped(bundle, manifest)) as artifact:
            found = f"what {artifact.target} loads is numbers, text and known settings alone"
            return _check(MODEL, "", passed=found)
    except ExporterError as error:
        return _check(MODEL, str(error))
