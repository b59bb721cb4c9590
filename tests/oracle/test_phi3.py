"""Phi-3 in both runtimes: matrices stored together, rotary embeddings of a part of each head, and `longrope`."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.compression import Compression
from exporter.foundation.errors import ExporterError, InputError, RequestError
from exporter.model.folder import save_folder
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.contract import budgeted, load_target, low_rank, lower
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued, in_float32, logits_by_transformers
from tests.gguf_files import edited_gguf
from tests.models import tiny_model

LENGTH, GENERATED, ORIGINAL = 96, 40, 256
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
# A head of 64 channels, of which three quarters are turned: 24 pairs.
FACTORS = {"short_factor": np.linspace(1, 3, 24).tolist(), "long_factor": np.linspace(1, 60, 24).tolist()}
LIKE_PHI_4 = {
    "original_max_position_embeddings": ORIGINAL, "sliding_window": 2048, "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", **FACTORS},
}  # fmt: skip
# As in the config.json of Phi-4-mini.
PUBLISHED = {
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "attention_bias": False,
    "rope_theta": 10000.0,
}  # fmt: skip


def phi_4(folder: Path, **changes: Any) -> Path:
    """Write a tiny model with the keys of a published Phi-4-mini."""
    tiny_model(folder, "phi3", hidden=256, intermediate=512, layers=3, changes=deepcopy(LIKE_PHI_4))
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | PUBLISHED | LIKE_PHI_4 | changes
    del config["rope_parameters"]
    path.write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phi_4(tmp_path_factory.mktemp("phi") / "model")


def expected_of(folder: Path) -> tuple[list[int], list[int]]:
    """Return a prompt and what transformers continues it with."""
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    return prompt, continued(folder, prompt, GENERATED)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_float_artifact_is_the_model(tmp_path: Path, folder: Path, target: str) -> None:
    artifact = in_float32(folder, target, tmp_path / "artifact")
    with open_model(str(folder)) as model:
        assert model.decoder.context_length == ORIGINAL
        assert any("code of its own" in note for note in model.warnings)
        assert any(f"the artifact is made for {ORIGINAL}" in note for note in model.warnings)
        reference = Reference.of(model, TOKENS)
    assert distance(reference, logits_by_transformers(folder)).kl_mean < 1e-9
    prompt, expected = expected_of(folder)
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6
        made = opened.generate(prompt, GENERATED)
    assert made == expected[: len(made)]
    assert len(made) == GENERATED or 1 in expected


def test_factors_and_the_turned_part_matter(tmp_path: Path, folder: Path) -> None:
    """What the test above would miss if llama.cpp took its defaults instead of the keys."""
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS)
    ones = np.ones(24, np.float32)
    wrong: list[tuple[dict[str, object], dict[str, np.ndarray]]] = [
        ({"phi3.rope.scaling.attn_factor": 1.0}, {}),
        ({}, {"rope_factors_short.weight": ones}),
        # llama.cpp takes the long factors as soon as the cache may hold more positions.
        ({"phi3.rope.scaling.original_context_length": LENGTH // 2}, {}),
    ]
    for number, (keys, tensors) in enumerate(wrong):
        edited = edited_gguf(path, tmp_path / f"{number}.gguf", keys, tensors)
        with OpenedArtifact(Artifact("gguf", tmp_path, (edited,)), LENGTH, 1, exact=True) as opened:
            assert distance(reference, opened.logits).kl_mean > 1e-4, (keys, tensors)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_window_is_the_most_of_the_context(tmp_path: Path, target: str) -> None:
    folder = tiny_model(tmp_path / "model", "phi3", changes={"sliding_window": 48})
    artifact = in_float32(folder, target, tmp_path / "artifact")
    tokens = TOKENS[:, :48]
    with open_model(str(folder)) as model:
        assert model.decoder.context_length == 48
        reference = Reference.of(model, tokens)
    with OpenedArtifact(artifact, 48, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


def test_a_saved_folder_is_stored_as_before(tmp_path: Path, folder: Path) -> None:
    with open_model(str(folder)) as model:
        save_folder(model, tmp_path / "saved")
    before, after = (
        AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).state_dict()
        for one in (folder, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_matrices_of_one_tensor_have_one_type(tmp_path: Path, folder: Path) -> None:
    target = load_target("gguf")
    with open_model(str(folder)) as model:
        layer = [
            tuple(group.role for group in storage.groups)
            for storage in budgeted(target).storages(model)
            if storage.groups[0].layer == 1
        ]
        assert layer == [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
        q8, q4 = (target.decide(model, type, "rtn") for type in ("Q8_0", "Q4_0"))
        mixed = [one if one.group.role == "k" else other for one, other in zip(q4, q8, strict=True)]
        with pytest.raises(RequestError, match=r"one tensor for q, k, v; got Q4_0 and Q8_0, expected one type for all"):
            lower(target, Compression(model, mixed), "mixed", tmp_path)
        assert not list(tmp_path.iterdir())
        with pytest.raises(RequestError, match=r"got Q8_0 and Q8_0 with factors, expected one type for all, and no fa"):
            factors = low_rank(target, 32, 16)
            with_factors = [replace(one, low_rank=factors) if one.group.role == "v" else one for one in q8]
            lower(target, Compression(model, with_factors), "factors", tmp_path)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"interpolate_factor": 2}, InputError, "config.json sets 'interpolate_factor', which no target carries"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}}, InputError, "code of its own"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, InputError, "code of its own"),
        ({"partial_rotary_factor": 1.5}, InputError, "no usable 'partial_rotary_factor'; got 1.5, expected a number"),
        ({"partial_rotary_factor": 0.7}, InputError, "transformers cannot read the config; got "),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, InputError, "transformers cannot read the con"),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "short_factor": [0.0] * 24}}, InputError,
            "config.json has no usable 'short_factor'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, InputError, "transformers cannot read the config"),
    ],
)  # fmt: skip
def test_what_no_runtime_computes_is_refused(
    tmp_path: Path, changes: dict[str, Any], kind: type[ExporterError], message: str
) -> None:
    folder = phi_4(tmp_path / "model", **changes)
    with pytest.raises(kind) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


def as_llama(phi: Path, folder: Path) -> Path:
    """Write the same model as a Llama, whose matrices are tensors of their own."""
    tiny_model(folder, "llama", layers=3, tied=False, changes={"rms_norm_eps": 1e-5})
    held = load_file(phi / "model.safetensors")
    for name in [name for name in held if "qkv_proj" in name or "gate_up_proj" in name]:
        stacked = held.pop(name)
        roles = ("q_proj", "k_proj", "v_proj") if "qkv" in name else ("gate_proj", "up_proj")
        sizes = (64, 32, 32) if "qkv" in name else (96, 96)
        for role, part in zip(roles, stacked.split(sizes), strict=True):
            held[name.replace("qkv_proj", role).replace("gate_up_proj", role)] = part.contiguous()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def compressed(folder: Path, made: Path) -> dict[str, np.ndarray]:
    """Return the matrices of an ONNX artifact whose codes compensate for the errors of earlier ones."""
    target, windows = load_target("onnx"), Windows.of(TOKENS[:, :64], "file", 0)
    made.mkdir()
    with open_model(str(folder)) as model:
        decisions = target.decide(model, "int4", "ldlq")
        rewritten = target.rewritten(model, collect(model, windows, 0, silent), decisions)
        compression = Compression(
            rewritten.model, decisions, rewritten.statistics, propagation_text=windows.tokens, source=model
        )
        read = target.read_back(lower(target, compression, "int4", made).artifact, rewritten.model)
        return {group.name: read(group) for group in model.groups()}


def test_it_is_compressed_as_a_llama_whose_matrices_are_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    phi = tiny_model(tmp_path / "phi", "phi3", layers=3, tied=False)
    one = compressed(phi, tmp_path / "one")
    other = compressed(as_llama(phi, tmp_path / "llama"), tmp_path / "other")
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
