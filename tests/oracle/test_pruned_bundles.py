"""Recipes that prune, from the source to a bundle: what was pruned, what it is compared with, and what is saved."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.calibrate.windows import file_windows
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.pipeline import Bundle, build
from exporter.planning.job import Job
from tests.models import tiny_model

WORDS = "the capital of France is Paris, numbers 12 345 and hello world. "
RECIPE = """
schema_version = 1
title = "A third of the channels goes"

[[step]]
method = "{method}"
ratio = 0.34
"""
WINDOW = 64


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bundle]:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    texts = {"calibration": WORDS, "evaluation": WORDS[::-1]}
    for name, words in texts.items():
        (tmp_path / name).write_text(words * 400)

    def make(method: str, target: str, family: str = "llama", more: str = "", **changes: object) -> Bundle:
        recipe = tmp_path / "mine.toml"
        recipe.write_text(RECIPE.format(method=method) + more)
        model = tiny_model(tmp_path / "model", family, layers=3)
        changes |= {name: tmp_path / name for name in texts}
        return build(
            Job(
                str(model), "raspberry-pi-5", target, output=tmp_path / "bundle", context=128, window=WINDOW, threads=1,
                effort="fast", recipe=str(recipe), save_pruned=tmp_path / "saved", **changes,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    return make


@torch.inference_mode()
def distributions(folder: Path, tokens: np.ndarray) -> torch.Tensor:
    """Return what transformers makes of a folder, logarithms of probabilities in the second half of each window."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = module(torch.from_numpy(tokens)).logits[:, WINDOW // 2 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize(
    ("method", "family", "more"),
    [
        ("prunenet", "llama", ""),
        ("prunenet", "qwen3", "repair = true"),
        ("prune-closed-form", "llama", ""),
        ("prune-closed-form", "qwen2", ""),
        ("prune-closed-form", "mistral", "sizes = 'equal'"),
    ],
)
def test_a_float32_bundle_is_as_far_from_the_source_as_what_is_saved(
    tmp_path: Path, built: Callable[..., Bundle], method: str, family: str, more: str, target: str
) -> None:
    bundle = built(method, target, family, more, type="F32")
    report = bundle.report
    assert report.passed
    assert report.recipe.scheme == "recipe mine, F32"
    with open_model(str(tmp_path / "model")) as source, open_model(str(tmp_path / "saved")) as saved:
        assert (report.model.digest, report.model.parameters) == (source.digest, source.decoder.parameters)
        assert report.pruning is not None
        assert saved.decoder.intermediate == (max(report.pruning.widths),) * 3
        tokens = file_windows(tmp_path / "evaluation", load_tokenizer(source.folder), 6, WINDOW).tokens
    before, after = (distributions(tmp_path / name, tokens) for name in ("model", "saved"))
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert report.accuracy.kl_mean.value == pytest.approx(kl, rel=1e-3)
    assert kl > 0.01
    assert report.accuracy.runtime_rounding_kl.value < 1e-5
    pruning = report.pruning
    assert pruning is not None and pruning.method == method
    assert pruning.removed.value == pytest.approx(1 / 3)
    assert pruning.removed.basis == "measured"
    assert sum(pruning.widths) == 2 / 3 * 3 * 96
    filled = family == "qwen2" and target == "gguf" and len(set(pruning.widths)) > 1
    assert (pruning.zero_bytes.value > 0) == filled
    rows = {row.layer: row.rows for row in report.tensors if row.role == "gate"}
    assert tuple(rows.values()) == ((max(pruning.widths),) * 3 if filled else pruning.widths)
    AutoTokenizer.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("target", ["gguf", "onnx", "onnx-qdq"])
def test_pruned_weights_are_coded_as_any_others(built: Callable[..., Bundle], target: str) -> None:
    bundle = built("prune-closed-form", target)
    assert bundle.report.passed
    assert [stage.name for stage in bundle.measurements.stages].count("rewrite") == 1


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_factors_beside_pruned_weights(built: Callable[..., Bundle], target: str) -> None:
    step = "[[step]]\nmethod = 'caldera'\nrank = 32\nfactor_bits = 8\n"
    bundle = built("prune-closed-form", target, more=step)
    assert bundle.report.passed
    assert {row.rows for row in bundle.report.tensors if "+r32" in row.format} > {64}


@pytest.mark.parametrize(("target", "bits"), [("gguf", 6.0), ("onnx", 13.0)])
def test_a_budget_is_of_the_source_s_weights(built: Callable[..., Bundle], target: str, bits: float) -> None:
    report = built("prunenet", target, bits=bits).report
    assert report.passed
    assert 0.8 * bits < report.size.bits_per_weight.value <= bits


def test_a_folder_in_the_way_is_seen_before_any_work(tmp_path: Path, built: Callable[..., Bundle]) -> None:
    (tmp_path / "saved").mkdir()
    with pytest.raises(RequestError, match=r"the folder exists already; name another"):
        built("prunenet", "gguf")
    assert not (tmp_path / "cache").exists()
