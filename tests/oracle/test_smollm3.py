"""SmolLM3 in ONNX: layers without rotary embeddings, whichever they are, and the fault of the builder around them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.foundation.errors import InputError
from exporter.model.excerpt import excerpt
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.contract import load_target
from exporter.targets.onnx import skeleton
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

LENGTH = 48
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))


def error_of(folder: Path, made: Path, part: Callable[[Model], Model] = lambda model: model) -> float:
    """Return the mean KL divergence of a float artifact from the model, or from a part of it."""
    made.mkdir()
    with open_model(str(folder)) as opened_model:
        model = part(opened_model)
        artifact = load_target("onnx").write_float(model, made)
        reference = Reference.of(model, TOKENS)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        return distance(reference, opened.logits).kl_mean


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # llama.cpp's graph has the period built in, and refuses these.
        {"no_rope_layers": [0, 1, 1, 0, 1]},
        {"no_rope_layers": [0] * 5},
        {"no_rope_layers": [1] * 5},
        {"use_sliding_window": True, "sliding_window": LENGTH, "layer_types": ["sliding_attention"] * 5},
    ],
)
def test_a_float_artifact_is_the_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = tiny_model(tmp_path / "model", "smollm3", layers=5, changes=changes)
    assert error_of(folder, tmp_path / "made") < 1e-9


def test_an_excerpt_is_its_model(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "smollm3", layers=5, changes={"no_rope_layers": [1, 0, 1, 1, 0]})
    assert error_of(folder, tmp_path / "made", excerpt) < 1e-9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 1], "no_rope_layers does not name each layer; got 2, expected 5"),
        ([], "no_rope_layers does not name each layer; got 0, expected 5"),
        ([1, 1, 1, -1, 1], "config.json has no usable 'no_rope_layers'"),
        (3, "config.json has no usable 'no_rope_layers'"),
    ],
)
def test_layers_of_which_nothing_is_said_are_refused(tmp_path: Path, given: object, message: str) -> None:
    folder = tiny_model(tmp_path / "model", "smollm3", layers=5)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"no_rope_layers": given}), "utf-8")
    with pytest.raises(InputError) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


def test_a_layer_that_is_turned_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_turned(own: Any) -> dict[str, Any]:
        def turned(builder: Any, layer: int, **given: Any) -> tuple[str, str]:
            builder.attention_attrs["use_rope_in_attn"] = True
            tables: tuple[str, str] = own.make_attention_qk_rope(builder, layer, **given)
            return tables

        return {"make_attention_qk_rope": turned}

    monkeypatch.setattr(skeleton, "_unrotated_layers", all_turned)
    folder = tiny_model(tmp_path / "model", "smollm3", layers=5)
    assert error_of(folder, tmp_path / "made") > 1e-4


def test_the_builder_needs_the_correction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, the builder's fault is gone: `_unrotated_layers` can be removed, and this test."""
    monkeypatch.setattr(skeleton, "_unrotated_layers", lambda own: {})
    folder = tiny_model(tmp_path / "model", "smollm3", layers=5)
    with pytest.raises(KeyError, match="position_ids"):
        error_of(folder, tmp_path / "made")
