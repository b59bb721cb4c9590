"""Gemma 3 in both runtimes: its windows, its two rotary embeddings and its norms, against transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.families.gemma3_text import ROUNDED_GELU_KL
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.prove.source_check import check_source
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued, in_float32
from tests.folders import rewrite
from tests.gguf_files import edited_gguf
from tests.models import tiny_model

WINDOW, LENGTH, GENERATED = 16, 96, 40
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
PERIOD_6 = {"layer_types": None, "sliding_window_pattern": 6}
SCALED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
# As the files of 2025 have it.
LEGACY = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "period 2": (4, {}),
    "period 2, scaled": (4, SCALED),
    "period 6": (7, PERIOD_6),
    "period 6, scaled, legacy keys": (7, PERIOD_6 | LEGACY),
    "untied": (2, {"tie_word_embeddings": False}),
    "another number of layers than llama.cpp has names for, no window in reach": (3, {"sliding_window": 4096}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers, changes = KINDS[request.param]
    tied = changes.get("tie_word_embeddings", True)
    rest = {key: value for key, value in changes.items() if key != "tie_word_embeddings"}
    place = tmp_path_factory.mktemp("gemma") / "model"
    return tiny_model(place, "gemma3_text", layers=layers, tied=tied, changes=rest)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_float_artifact_is_the_model_beyond_its_window(tmp_path: Path, folder: Path, target: str) -> None:
    artifact = in_float32(folder, target, tmp_path / "artifact")
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_tokens_generated_one_at_a_time_are_the_models(tmp_path: Path, folder: Path, target: str) -> None:
    artifact = in_float32(folder, target, tmp_path / "artifact")
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    expected = continued(folder, prompt, GENERATED)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        made = opened.generate(prompt, GENERATED)
    assert made == expected[: len(made)]
    # A random model may choose its end token, after which runtimes stop.
    assert len(made) == GENERATED or 1 in expected


def test_a_gguf_file_is_the_model_again(tmp_path: Path, folder: Path) -> None:
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(folder)) as model, open_model(str(path)) as again:
        assert again.decoder == replace(model.decoder, positions=again.decoder.positions)
        assert again.config.query_pre_attn_scalar == model.config.query_pre_attn_scalar
        for name in model.decoder.tensors():
            # A file holds a norm's gain, 1 + w.
            np.testing.assert_allclose(again.read(name), model.read(name), rtol=0, atol=2e-7)
        expected, found = Reference.of(model, TOKENS), Reference.of(again, TOKENS)
        for window in range(len(TOKENS)):
            given = slice(0, LENGTH)
            torch.testing.assert_close(found.logits(window, given), expected.logits(window, given), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("keys", "layers", "windowed"),
    [
        ({"gemma3.attention.sliding_window_pattern": None}, 7, [0, 1, 2, 3, 4, 6]),
        ({"gemma3.attention.sliding_window_pattern": 3}, 7, [0, 1, 3, 4, 6]),
        ({"gemma3.attention.sliding_window_pattern": 0}, 2, [0, 1]),
    ],
)
def test_a_header_gives_windows_as_llama_cpp_reads_it(
    tmp_path: Path, keys: dict[str, object], layers: int, windowed: list[int]
) -> None:
    folder = tiny_model(tmp_path / "model", "gemma3_text", layers=layers)
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    edited = edited_gguf(path, tmp_path / "edited.gguf", keys)
    with open_model(str(edited)) as model:
        assert [layer for layer, window in enumerate(model.decoder.windows) if window] == windowed
        reference = Reference.of(model, TOKENS)
    with OpenedArtifact(Artifact("gguf", tmp_path, (edited,)), LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


def test_a_source_may_differ_by_the_rounding_of_gelu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model is further from transformers than a family without GELU may be."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", "gemma3_text", layers=4)
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(path)) as model:
        (check,) = check_source(model, TOKENS, 1, tmp_path)
    assert check.status == "passed"
    assert check.limit == ROUNDED_GELU_KL
    rewrite(folder, lambda held: {name: 0 * one if "gate_proj" in name else one for name, one in held.items()})
    path = in_float32(folder, "gguf", tmp_path / "gates-at-zero").weights[0]
    with open_model(str(path)) as model:
        (without,) = check_source(model, TOKENS, 1, tmp_path)
    assert without.value < 0.01 * check.value


def test_windows_and_both_embeddings_matter(tmp_path: Path) -> None:
    """What the tests above would miss if llama.cpp took its defaults instead of the keys."""
    folder = tiny_model(tmp_path / "model", "gemma3_text", layers=4)
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS)
    wrong = {
        "gemma3.attention.sliding_window_pattern": None,
        "gemma3.attention.sliding_window": 64,
        "gemma3.rope.freq_base_swa": 1e6,
        "gemma3.rope.freq_base": 1e4,
    }
    for number, (key, value) in enumerate(wrong.items()):
        edited = edited_gguf(path, tmp_path / f"{number}.gguf", {key: value})
        with OpenedArtifact(Artifact("gguf", tmp_path, (edited,)), LENGTH, 1, exact=True) as opened:
            assert distance(reference, opened.logits).kl_mean > 1e-4, key


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"query_pre_attn_scalar": 32}, RequestError, "llama.cpp's 'gemma3' has another value built in; got 32, exp"),
        ({"final_logit_softcapping": 30.0}, InputError, "config.json sets 'final_logit_softcapping', which no target"),
        ({"attn_logit_softcapping": 50.0}, InputError, "config.json sets 'attn_logit_softcapping', which no target"),
        ({"use_bidirectional_attention": True}, InputError, "'use_bidirectional_attention', which no target carries"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                                 "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            InputError, "rotary embeddings of type 'linear' are not supported; got rope_parameters.sliding_attention",
        ),
        ({"attention_bias": True}, InputError, "a Gemma3ForCausalLM with attention_bias=true is not supported"),
    ],
)  # fmt: skip
def test_what_no_runtime_computes_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[ExporterError], message: str
) -> None:
    folder = tiny_model(tmp_path / "model", "gemma3_text", changes=changes)
    with pytest.raises(kind) as refused, open_model(str(folder)) as model:
        load_target("gguf").decide(model, "F32", "rtn")
    assert message in str(refused.value)
