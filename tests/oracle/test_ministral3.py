"""Ministral 3 in both runtimes: `yarn`, and queries that grow with their position, which one runtime leaves out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued, in_float32
from tests.folders import edit
from tests.gguf_files import edited_gguf
from tests.models import tiny_model

LENGTH, GENERATED, ORIGINAL = 96, 40, 32
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
# As in the config.json of Ministral 3, whose numbers of positions are larger and whose beta is smaller.
ROPE = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.5, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 1e6, "rope_type": "yarn",
    "type": "yarn",
}  # fmt: skip


def made(folder: Path, layers: int = 3, **rope: Any) -> Path:
    return edit(tiny_model(folder, "ministral3", layers=layers), rope_parameters=ROPE | rope)


def reference_of(folder: Path, tokens: np.ndarray = TOKENS) -> Reference:
    with open_model(str(folder)) as model:
        return Reference.of(model, tokens)


@pytest.mark.parametrize("rope", [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"original_max_position_embeddings": 40}])
def test_queries_grow_in_llama_cpp_as_in_the_model(tmp_path: Path, rope: dict[str, Any]) -> None:
    folder = made(tmp_path / "model", **rope)
    artifact, reference = in_float32(folder, "gguf", tmp_path / "artifact"), reference_of(folder)
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    expected = continued(folder, prompt, GENERATED)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6
        generated = opened.generate(prompt, GENERATED)
    assert generated == expected[: len(generated)]
    assert len(generated) == GENERATED or 1 in expected


def test_each_key_matters(tmp_path: Path) -> None:
    """What the test above would miss if llama.cpp took its defaults instead of the keys."""
    folder = made(tmp_path / "model")
    path, reference = in_float32(folder, "gguf", tmp_path / "artifact").weights[0], reference_of(folder)
    wrong: dict[str, object] = {
        "mistral3.attention.temperature_scale": None,
        "mistral3.rope.scaling.original_context_length": 64,
        "mistral3.rope.scaling.attn_factor": 1.0,
        "mistral3.rope.scaling.factor": 2.0,
        # Published files hold this key, whose factor is in `attn_factor` here.
        "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
    }
    for number, (key, value) in enumerate(wrong.items()):
        edited = edited_gguf(path, tmp_path / f"{number}.gguf", {key: value})
        with OpenedArtifact(Artifact("gguf", tmp_path, (edited,)), LENGTH, 1, exact=True) as opened:
            assert distance(reference, opened.logits).kl_mean > 1e-4, key


def test_onnx_holds_the_positions_before_queries_grow(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", original_max_position_embeddings=64)
    artifact = in_float32(folder, "onnx", tmp_path / "artifact")
    tokens = TOKENS[:, :64]
    with OpenedArtifact(artifact, 64, 1, exact=True) as opened:
        assert opened.positions() == 64
        assert distance(reference_of(folder, tokens), opened.logits).kl_mean < 1e-6


def test_the_context_is_that_of_the_target(tmp_path: Path) -> None:
    def job(target: str, context: int) -> Job:
        return Job("model", "raspberry-pi-5", target, context=context)

    with open_model(str(made(tmp_path / "model", original_max_position_embeddings=256))) as model:
        assert resolve(job("gguf", 1024), model).original is model
        bounded = resolve(job("onnx", 256), model).original
        assert bounded.decoder.context_length == 256
        assert "made for 256 of the model's 1,024 positions; this target computes no more" in bounded.warnings[-1]
        for target in ("onnx", "onnx-qdq"):
            with pytest.raises(RequestError, match=f"than the target {target} computes for .* expected at most 256"):
                resolve(job(target, 257), model)


@pytest.mark.parametrize(
    ("rope", "kind", "message"),
    [
        ({"llama_4_scaling_beta": None}, InputError, "no usable 'llama_4_scaling_beta'; got None, expected a positive"),
        ({"llama_4_scaling_beta": True}, InputError, "config.json has no usable 'llama_4_scaling_beta'; got True"),
        ({"original_max_position_embeddings": None}, InputError, "no usable 'original_max_position_embeddings'"),
        ({"attention_temperature": 2.0}, InputError, "config.json sets 'attention_temperature' in rope_parameters"),
        (
            {"rope_type": "linear", "type": "linear", "factor": 2.0}, InputError,
            "config.json sets 'beta_fast' in rope_parameters, which no target carries",
        ),
        (
            {"beta_fast": 8.0, "original_max_position_embeddings": 16384}, RequestError,
            "llama.cpp slows other pairs down with YaRN than this model",
        ),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(
    tmp_path: Path, rope: dict[str, Any], kind: type[ExporterError], message: str
) -> None:
    with pytest.raises(kind) as refused, open_model(str(made(tmp_path / "model", 1, **rope))) as model:
        load_target("gguf").decide(model, "F32", "rtn")
    assert message in str(refused.value)
