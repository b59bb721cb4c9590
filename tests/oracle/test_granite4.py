"""Granite 4.0 in both runtimes: its shared feed-forward part, and models without rotary embeddings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from exporter.foundation.errors import InputError
from exporter.model.folder import save_folder
from exporter.model.sources import open_model
from exporter.model.widths import outlined
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued, logits_by_transformers
from tests.folders import edit
from tests.gguf_files import edited_gguf
from tests.models import tiny_model

LENGTH, GENERATED = 96, 40
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
# As in the config.json of Granite 4.0 1B.
PUBLISHED = {
    "init_method": "mup", "layer_types": ["attention"] * 3, "mamba_chunk_size": 256, "mamba_conv_bias": True,
    "mamba_d_conv": 4, "mamba_d_head": ..., "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_n_heads": 128, "mamba_proj_bias": False, "normalization_function": "rmsnorm", "num_experts_per_tok": 0,
    "output_router_logits": False, "rope_parameters": ..., "rope_scaling": None, "rope_theta": 10000000,
    "router_aux_loss_coef": 0.01, "time_step_limit": ...,
}  # fmt: skip
WITHOUT_ROTARY = {"position_embedding_type": "nope"}


def made(folder: Path, **changes: Any) -> Path:
    return edit(tiny_model(folder, "granitemoehybrid", layers=3), **PUBLISHED | changes)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("changes", [{}, WITHOUT_ROTARY, {"position_embedding_type": None}])
def test_a_float_artifact_is_the_model(tmp_path: Path, target: str, changes: dict[str, Any]) -> None:
    folder = made(tmp_path / "model", **changes)
    (tmp_path / "artifact").mkdir()
    with open_model(str(folder)) as model:
        artifact, reference = load_target(target).write_float(model, tmp_path / "artifact"), Reference.of(model, TOKENS)
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    expected = continued(folder, prompt, GENERATED)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6
        generated = opened.generate(prompt, GENERATED)
    assert generated == expected[: len(generated)]
    assert len(generated) == GENERATED or 1 in expected


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (WITHOUT_ROTARY, "rope.scaling.finetuned", None),
        ({}, "rope.scaling.finetuned", False),
        ({}, "attention.scale", 0.25),
        ({}, "residual_scale", 1.0),
    ],
)
def test_each_key_matters(tmp_path: Path, changes: dict[str, Any], key: str, value: object) -> None:
    (tmp_path / "artifact").mkdir()
    with open_model(str(made(tmp_path / "model", **changes))) as model:
        path = load_target("gguf").write_float(model, tmp_path / "artifact").weights[0]
        reference = Reference.of(model, TOKENS)
    edited = edited_gguf(path, tmp_path / "edited.gguf", {f"granite.{key}": value})
    with OpenedArtifact(Artifact("gguf", tmp_path, (edited,)), LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean > 1e-4


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_layers_of_several_widths(tmp_path: Path, target: str) -> None:
    (tmp_path / "artifact").mkdir()
    with open_model(str(made(tmp_path / "model"))) as model:
        pruned = outlined(model, [64, 32, 96])
        lowered = load_target(target)
        artifact = lowered.write_float(lowered.as_stored(pruned).model, tmp_path / "artifact")
        reference = Reference.of(pruned, TOKENS)
        save_folder(pruned, tmp_path / "saved")
    assert distance(reference, logits_by_transformers(tmp_path / "saved")).kl_mean < 1e-9
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


def test_a_saved_folder_is_stored_as_before(tmp_path: Path) -> None:
    folder = made(tmp_path / "model", **WITHOUT_ROTARY)
    with open_model(str(folder)) as model:
        save_folder(model, tmp_path / "saved")
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with open_model(str(tmp_path / "saved")) as again:
        assert not again.decoder.family.rotates(again.config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["mamba", "attention", "mamba"]}, "has Mamba layers, which no target carries; got 2 of 3 la"),
        ({"layer_types": ...}, "the model has Mamba layers, which no target carries; got 3 of 3 layers"),
        ({"num_local_experts": 8}, "has experts beside its shared feed-forward part, which no target carries; got num"),
        ({"num_local_experts": ...}, "the model has experts beside its shared feed-forward part"),
        ({"normalization_function": "layernorm"}, "config.json sets 'normalization_function', which no target carr"),
        ({"residual_multiplier": None}, "config.json has no usable 'residual_multiplier'; got None, expected a positi"),
        ({"shared_intermediate_size": 0}, "config.json has no usable 'shared_intermediate_size'; got 0"),
        ({"shared_intermediate_size": 64}, "shared_mlp.input_linear.weight: the tensor has the wrong shape; got"),
    ],
)
def test_what_no_target_carries_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused, open_model(str(made(tmp_path / "model", **changes))):
        pass
    assert message in str(refused.value)


def test_a_hybrid_as_transformers_saves_it_is_refused(tmp_path: Path) -> None:
    kind = GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM
    mamba = {"mamba_n_heads": 8, "mamba_d_state": 16, "num_local_experts": 0, "shared_intermediate_size": 96}
    folder = tiny_model(tmp_path / "model", "hybrid", changes=mamba, kind=kind)
    with pytest.raises(InputError, match="Mamba layers"), open_model(str(folder)):
        pass
