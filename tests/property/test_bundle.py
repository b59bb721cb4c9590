"""Whatever is changed in a bundle is found, and only the content decides the content digest."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from exporter.bundle.manifest import FileEntry, Manifest, ManifestHeader, Provenance, files_below
from exporter.bundle.verify import verify_bundle
from exporter.bundle.write import staging_folder, write_bundle
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import from_json
from exporter.report.data import Report
from tests.unit.test_bundle import SELF_TEST

DATA = Path(__file__).parents[1] / "data"
MODEL = bytes(range(256)) * 3
PATHS = [
    "licences/A",
    "manifest.json",
    "measurements.json",
    "model/model.gguf",
    "plan.json",
    "report.json",
    "selftest.json",
]
QUICK = settings(max_examples=60, deadline=None)


def header() -> ManifestHeader:
    report = from_json(Report, (DATA / "report.json").read_bytes(), "report.json")
    provenance = Provenance(exporter="0", versions={}, model_digest="", instruction_set="", threads=1)
    return ManifestHeader(
        name="p", target=report.target, device=report.device, runtime={}, recipe=report.recipe, provenance=provenance
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("property") / "bundle"
    with staging_folder(output) as folder:
        for path, data in {"model/model.gguf": MODEL, "licences/A": b"x", "selftest.json": SELF_TEST}.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(data)
        for name in ("plan.json", "report.json", "measurements.json"):
            shutil.copyfile(DATA / name, folder / name)
        write_bundle(folder, output, header())
    assert files_below(output)[0] == PATHS
    assert sound(output)
    yield output
    assert sound(output)


def sound(bundle: Path) -> bool:
    try:
        return all(check.status == "passed" for check in verify_bundle(bundle))
    except InputError:
        return False


@QUICK
@given(path=st.sampled_from(PATHS), place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_is_found(bundle: Path, path: str, place: float, flip: int) -> None:
    original = (bundle / path).read_bytes()
    changed = bytearray(original)
    changed[int(place * len(changed))] ^= flip
    (bundle / path).write_bytes(changed)
    try:
        assert not sound(bundle)
    finally:
        (bundle / path).write_bytes(original)


@QUICK
@given(path=st.sampled_from(PATHS), keep=st.floats(0, 1, exclude_max=True), tail=st.binary(min_size=1, max_size=9))
def test_any_cut_or_longer_file_is_found(bundle: Path, path: str, keep: float, tail: bytes) -> None:
    original = (bundle / path).read_bytes()
    try:
        for changed in (original[: int(keep * len(original))], original + tail):
            (bundle / path).write_bytes(changed)
            assert not sound(bundle)
    finally:
        (bundle / path).write_bytes(original)


@pytest.mark.parametrize("path", PATHS)
def test_any_deleted_file_is_found(bundle: Path, path: str) -> None:
    original = (bundle / path).read_bytes()
    (bundle / path).unlink()
    try:
        assert not sound(bundle)
    finally:
        (bundle / path).write_bytes(original)


@QUICK
@given(folder=st.sampled_from(["", "model", "licences"]), name=st.text("abc.~ XÉ", min_size=1, max_size=12))
def test_any_added_file_is_found(bundle: Path, folder: str, name: str) -> None:
    added = bundle / folder / name
    assume(name not in {".", ".."} and not added.exists())
    added.write_bytes(b"")
    try:
        assert not sound(bundle)
    finally:
        added.unlink()


hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
sizes = st.integers(0, (1 << 63) - 1)
entries = st.builds(FileEntry.of, st.sampled_from(PATHS[3:]), sizes, hashes)
volatile = st.builds(FileEntry.of, st.sampled_from(["measurements.json", "report.html"]), sizes, hashes)


def by_path(entry: FileEntry) -> str:
    return entry.path


@QUICK
@given(
    content=st.lists(entries, unique_by=by_path),
    first=st.lists(volatile, unique_by=by_path),
    second=st.lists(volatile, unique_by=by_path),
)
def test_measurements_do_not_touch_the_digest(
    content: list[FileEntry], first: list[FileEntry], second: list[FileEntry]
) -> None:
    facts = header()
    digest = Manifest.of(facts, content).content_digest
    assert Manifest.of(facts, content + first).content_digest == digest
    assert Manifest.of(facts, second + content).content_digest == digest


@QUICK
@given(one=st.lists(entries, unique_by=by_path), other=st.lists(entries, unique_by=by_path))
def test_other_content_has_another_digest(one: list[FileEntry], other: list[FileEntry]) -> None:
    assume(sorted(one, key=by_path) != sorted(other, key=by_path))
    facts = header()
    assert Manifest.of(facts, one).content_digest != Manifest.of(facts, other).content_digest
