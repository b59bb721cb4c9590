"""How often a build reads a matrix from the source's files, and that some rows are the rows of the whole."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import rescaled
from exporter.formats.format import Float32
from exporter.model.checkpoint import Checkpoint
from exporter.model.excerpt import excerpt_if_large
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.widths import padded, selected
from exporter.pipeline import build
from exporter.planning.job import Job
from exporter.prove.accuracy import dequantised
from exporter.targets.contract import load_target
from tests.models import tiny_model

WORDS = "The quick brown fox jumps over the lazy dog, and 12 more of them follow it. "


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_build_reads_a_matrix_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Twice for the statistics of both texts, once to compress it, and once for the distribution of the original."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    tiny_model(tmp_path / "model", hidden=256, intermediate=256)
    for name in ("calibration", "evaluation"):
        (tmp_path / f"{name}.txt").write_text(name + WORDS * 200)
    reads: Counter[str] = Counter()
    read = Checkpoint.read

    def counting(source: Checkpoint, name: str) -> Float32:
        reads[name] += 1
        return read(source, name)

    monkeypatch.setattr(Checkpoint, "read", counting)
    job = Job(
        str(tmp_path / "model"), "raspberry-pi-5", target, output=tmp_path / "bundle", bits=6.0, window=64, context=64,
        calibration=tmp_path / "calibration.txt", evaluation=tmp_path / "evaluation.txt", effort="balanced", threads=1,
    )  # fmt: skip
    build(job)
    with open_model(job.source) as model:
        inside = {reads[group.name] for group in model.groups() if group.layer is not None}
        table = reads[model.decoder.embedding.name]
    assert inside == {4}
    # Embedded in each run, and the head at the end of each.
    assert table <= 10


def changed_in_every_way(model: Model, folder: Path) -> dict[str, Model]:
    """Return models whose tensors are made of a model's on reading."""
    columns = {name: site.columns for name, site in model.decoder.sites.items()}

    def factors(site: str, _: object) -> Float32:
        return np.random.default_rng(1).uniform(0.5, 2, columns[site]).astype(np.float32)

    kept = [np.arange(0, 64)] * model.decoder.layers
    artifact = load_target("gguf").write_float(model, folder)
    return {
        "itself": model,
        "scaled": rescaled(model, Statistics(folder), ("attention_in", "attention_out", "mlp_out"), factors).model,
        "selected": selected(model, kept, {}),
        "padded": padded(selected(model, [np.arange(0, 32), *kept[1:]], {})),
        "excerpt": excerpt_if_large(model),
        "read back": dequantised(model, load_target("gguf").read_back(artifact, model)),
    }


@pytest.mark.parametrize("way", ["itself", "scaled", "selected", "padded", "excerpt", "read back", "gguf"])
def test_some_rows_are_the_rows_of_the_whole(tmp_path: Path, way: str) -> None:
    folder = tiny_model(tmp_path / "model", layers=3)
    rows = np.array([0, 5, 6, 31])
    with open_model(str(folder)) as source:
        (tmp_path / "made").mkdir()
        changed = changed_in_every_way(source, tmp_path / "made")
        if way == "gguf":
            with open_model(str(tmp_path / "made" / "model.gguf")) as again:
                changed[way] = replace(again, name="again")
                same(changed[way], rows)
        else:
            same(changed[way], rows)


def same(model: Model, rows: np.ndarray) -> None:
    for group in model.groups():
        np.testing.assert_array_equal(model.read_rows(group.name, rows), model.read(group.name)[rows])
