"""OLMo 3 in llama.cpp: any pattern of windows, and rotary embeddings that are scaled in layers without one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import in_float32
from tests.folders import edit
from tests.gguf_files import edited_gguf
from tests.models import OLMO3_ROPE, tiny_model

LENGTH = 96
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
FULL, SLIDING = "full_attention", "sliding_attention"
# As in the config.json of Olmo-3-7B, whose numbers are larger: the scaling is that of layers without a window.
PUBLISHED = {
    "rope_theta": 500000, "sliding_window": 16,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED | {"rope_parameters": ...},
    "period 2": {"layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "no period": {"layer_types": [FULL, SLIDING, SLIDING, FULL]},
    "windows in all layers": {"layer_types": [SLIDING] * 4},
    "windows in none": {"layer_types": [FULL] * 4},
    "no window in reach": {"sliding_window": 4096},
    "linear": {"rope_parameters": OLMO3_ROPE | {FULL: {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}},
}


def made(folder: Path, changes: dict[str, Any]) -> Path:
    return edit(tiny_model(folder, "olmo3", layers=4, tied=False), **changes)


def reference(folder: Path) -> Reference:
    with open_model(str(folder)) as model:
        return Reference.of(model, TOKENS)


def kl(artifact: Artifact, original: Reference) -> float:
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        return distance(original, opened.logits).kl_mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_artifact_is_the_model_beyond_its_window(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path / "model", KINDS[kind])
    assert kl(in_float32(folder, "gguf", tmp_path / "artifact"), reference(folder)) < 1e-6


def test_windows_and_the_scaling_matter(tmp_path: Path) -> None:
    """What the test above would miss if llama.cpp took its defaults instead of the keys."""
    folder = made(tmp_path / "model", KINDS["no period"])
    artifact, original = in_float32(folder, "gguf", tmp_path / "artifact"), reference(folder)
    wrong = {
        "olmo2.attention.sliding_window_pattern": None,
        "olmo2.attention.sliding_window": 64,
        "olmo2.rope.scaling.factor": 1.0,
        "olmo2.rope.scaling.attn_factor": 1.1,
        "olmo2.rope.freq_base": 500.0,
    }
    for number, (key, value) in enumerate(wrong.items()):
        edited = edited_gguf(artifact.weights[0], tmp_path / f"{number}.gguf", {key: value})
        assert kl(Artifact("gguf", tmp_path, (edited,)), original) > 1e-4, key


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            # transformers takes this base for layers without a window alone, and its own for the others.
            {"rope_parameters": ..., "rope_theta": 10000.0}, RequestError,
            "rope_theta of sliding_attention: llama.cpp's 'olmo2' has another value built in; got 500000.0, expected 1",
        ),
        ({"head_dim": 32, "num_attention_heads": 4}, RequestError, "got 4 heads of 32, hidden size 64"),
        (
            {"rope_parameters": OLMO3_ROPE | {SLIDING: OLMO3_ROPE[FULL]}}, InputError,
            "rotary embeddings of type 'yarn' are not supported; got rope_parameters.sliding_attention",
        ),
        ({"attention_bias": True}, InputError, "a Olmo3ForCausalLM with attention_bias=true is not supported"),
        ({"sliding_window": None}, InputError, "layer_types names kinds of attention that do not go together"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kind: type[ExporterError], message: str
) -> None:
    monkeypatch.setattr("exporter.model.decoder.Decoder.check_shapes", lambda *_: None)
    folder = made(tmp_path / "model", changes)
    with pytest.raises(kind) as refused, open_model(str(folder)) as model:
        load_target("gguf").decide(model, "F32", "rtn")
    assert message in str(refused.value)
