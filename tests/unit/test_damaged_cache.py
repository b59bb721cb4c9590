"""A cache that was damaged, shared or left half-made gives the same bundles as a new one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.foundation import cache_entries as entries
from exporter.foundation.cache_entries import folder_is_whole, is_whole
from exporter.foundation.errors import InputError, RequestError
from exporter.foundation.progress import Progress, silent
from exporter.pipeline import build
from exporter.planning.job import Job
from tests.damage import DAMAGES, cached_files, flipped, left_over
from tests.gguf_files import float_gguf
from tests.killing import WORDS, alone, kills, source
from tests.models import tiny_model
from tests.unit.test_cache import largest_file

pytestmark = pytest.mark.slow

RECIPES = {"closed": 'method = "prune-closed-form"\nratio = 0.34', "net": 'method = "prunenet"\nratio = 0.34'}
# All kinds of entries come of these together.
JOBS = {"gguf": ("model.gguf", None), "onnx": ("model", "closed"), "onnx-qdq": ("model", "net")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("builds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_EXPORTER_CACHE", str(folder / "cache"))
        patch.setattr("tempfile.tempdir", str(folder))
        tiny_model(folder / "model")
        float_gguf(folder / "model", folder / "model.gguf")
        (folder / "text").write_text(WORDS)
        for name, step in RECIPES.items():
            (folder / f"{name}.toml").write_text(f'schema_version = 1\ntitle = "x"\n[[step]]\n{step}\n')
        yield folder


def built(folder: Path, target: str, progress: Progress = silent) -> str:
    """Build a bundle and return its content digest."""
    name, recipe = JOBS[target]
    text = None if target == "gguf" else folder / "text"
    job = Job(
        str(folder / name), "raspberry-pi-5", target, output=folder / "bundle", calibration=text,
        evaluation=folder / "text", window=64, evaluation_windows=4, effort="fast", context=128, threads=1,
        recipe=recipe and str(folder / f"{recipe}.toml"),
    )  # fmt: skip
    made = build(job, progress).manifest.content_digest
    shutil.rmtree(folder / "bundle")
    return made


@pytest.fixture(scope="module")
def clean(folder: Path) -> dict[str, str]:
    """Return target -> content digest of builds that find nothing in the cache."""
    return {target: built(folder, target) for target in ("gguf", "onnx-qdq")}


def test_a_source_that_changes_during_a_build_is_noticed(folder: Path) -> None:
    def change(stage: str, done: int, total: int) -> None:
        if stage == "compress: matrices":
            (folder / "model" / "tokenizer.json").touch()

    changed = r"tokenizer.json: the source changed while it was read, so nothing is written"
    with pytest.raises(InputError, match=changed):
        built(folder, "onnx", change)
    assert not (folder / "bundle").exists()


def test_no_damaged_file_is_taken_for_whole(folder: Path, clean: dict[str, str]) -> None:
    files = list(cached_files(folder / "cache"))
    assert {path.relative_to(folder / "cache").parts[0] for path in files} == {
        "gguf", "texts", "samples", "statistics", "pruned", "policies", "references", "templates", "vocabularies"
    }  # fmt: skip
    assert len(clean) == 2
    for path in files:
        whole = path.read_bytes()
        check, entry = (folder_is_whole, path.parent) if path.parent.parent.name == "gguf" else (is_whole, path)
        entries._known.clear()
        assert check(entry), path
        for damage in DAMAGES:
            path.write_bytes(damage(whole))
            assert not check(entry), (path, damage)
        path.write_bytes(whole)


@pytest.mark.parametrize(("target", "damage"), [*(("gguf", damage) for damage in DAMAGES), ("onnx-qdq", flipped)])
def test_a_build_on_damaged_files_gives_the_same_bundle(
    folder: Path, clean: dict[str, str], target: str, damage: Callable[[bytes], bytes]
) -> None:
    for path in cached_files(folder / "cache"):
        path.write_bytes(damage(path.read_bytes()))
    assert built(folder, target) == clean[target]
    assert left_over(folder) == []


@pytest.mark.parametrize("count", [1 << 13, 1 << 16])
def test_a_disk_that_takes_no_large_file_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with largest_file(count), pytest.raises(RequestError, match="free on the disk at /"):
        built(folder, "onnx")
    assert not (folder / "bundle").exists()
    assert left_over(folder) == left_over(tmp_path) == []


def test_builds_that_are_killed_and_two_at_once_give_the_same_bundle_and_leave_nothing(tmp_path: Path) -> None:
    takes_s = alone(source(tmp_path))
    assert kills(tmp_path, takes_s / 2, count=4, seed=0, in_a_row=4, at_once=2) >= 4
