"""Models of unknown families: the error names the nearest one and what differs. Code of a model is always refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.foundation.errors import InputError
from exporter.model.family import families
from exporter.model.relatives import block_tensors, nearest
from exporter.model.sources import open_model
from tests.models import ALL_FAMILIES, tiny_model

FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 320, "alibi": True, "new_decoder_architecture": True, "parallel_attn": True,
}  # fmt: skip
FALCON_BLOCK = (
    "self_attention.query_key_value.weight", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight", "input_layernorm.weight",
)  # fmt: skip
T5 = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16,
    "num_heads": 4, "num_layers": 2, "relative_attention_num_buckets": 32, "vocab_size": 320,
}  # fmt: skip
T5_BLOCK = ("layer.0.SelfAttention.q.weight", "layer.0.SelfAttention.o.weight", "layer.1.DenseReluDense.wi.weight")


def refused(folder: Path) -> str:
    """Return the error, which is the same each time."""
    said = set()
    for _ in range(2):
        with pytest.raises(InputError) as error, open_model(str(folder)):
            pass
        said.add(str(error.value))
    (only,) = said
    return only


def written(folder: Path, config: dict[str, object], names: list[str]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, folder / "model.safetensors")
    return folder


def edited(folder: Path, **values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def test_a_renamed_llama_is_told_what_to_call_itself(tmp_path: Path) -> None:
    folder = edited(tiny_model(tmp_path / "model"), architectures=["MyLlamaForCausalLM"], model_type="my_llama")
    said = refused(folder)
    assert "the architecture 'MyLlamaForCausalLM' is not supported; expected one of Gemma3ForCausalLM" in said
    assert "keys and tensors are those of llama (Llama 2 and 3" in said
    assert said.endswith("give config.json the model_type 'llama' and the architecture 'LlamaForCausalLM'.")
    edited(folder, clip_qkv=8.0)
    assert "the nearest family is llama (Llama 2 and 3" in refused(folder)
    assert refused(folder).endswith("config.json sets besides 'clip_qkv'.")
    edited(folder, architectures=["LlamaForCausalLM"], clip_qkv=None)
    assert "no usable 'model_type'; got 'my_llama'" in refused(folder)
    assert "keys and tensors are those of llama" in refused(folder)


def test_of_a_model_like_falcon_the_tensors_and_keys_that_differ_are_told(tmp_path: Path) -> None:
    names = [f"transformer.h.{layer}.{name}" for layer in range(2) for name in FALCON_BLOCK]
    said = refused(written(tmp_path / "model", FALCON, names))
    found = nearest(FALCON, names)
    assert f"the nearest family is {found.family.model_type} ({found.family.title}): its blocks lack" in said
    assert found.alike > 0
    assert set(found.more) == set(FALCON_BLOCK) - block_tensors(found.family)
    assert set(found.foreign) == {"alibi", "new_decoder_architecture", "parallel_attn"}
    assert "its blocks have besides 'mlp.dense_4h_to_h.weight', 'mlp.dense_h_to_4h.weight'" in said
    assert "config.json sets besides 'alibi', 'new_decoder_architecture', 'parallel_attn'" in said


def test_of_t5_all_tensors_differ(tmp_path: Path) -> None:
    names = [f"{part}.block.{layer}.{name}" for part in ("encoder", "decoder") for layer in (0, 1) for name in T5_BLOCK]
    said = refused(written(tmp_path / "model", T5, names))
    found = nearest(T5, names)
    assert found.alike == 0 and len(found.more) == len(T5_BLOCK)
    assert "the architecture 'T5ForConditionalGeneration' is not supported" in said
    assert "config.json sets besides 'd_ff', 'd_kv', 'd_model', 'num_layers' and 1 more" in said


def test_without_weights_the_keys_alone_count(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "qwen3_moe")
    (tmp_path / "model" / "model.safetensors").unlink()
    edited(tmp_path / "model", architectures=["MyMoeForCausalLM"], model_type="my_qwen3_moe")
    assert "; keys are those of qwen3_moe (Qwen3 with experts): if" in refused(tmp_path / "model")


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_a_family_is_nearest_to_itself(tmp_path: Path, family: str) -> None:
    with open_model(str(tiny_model(tmp_path / "model", family, layers=4, changes=four_layers(family)))) as model:
        raw = json.loads((tmp_path / "model" / "config.json").read_text())
        found = nearest(raw, model.decoder.stored_tensors())
    assert found.family.model_type == family, found.told
    assert not found.foreign
    assert set(families()) >= {found.family.architecture}


def four_layers(family: str) -> dict[str, object]:
    return {"no_rope_layers": [1, 1, 1, 0]} if family == "smollm3" else {}


# What is changed in config.json; what its value was, and what it becomes.
CONTRADICTIONS = {
    "gemma4_text": ("vocab_size", 320, 321),
    "granitemoehybrid": ("shared_intermediate_size", 96, 128),
    "lfm2": ("vocab_size", 320, 321),
    "phi3": ("intermediate_size", 96, 128),
    "qwen3_moe": ("moe_intermediate_size", 32, 48),
}


@pytest.mark.parametrize("family", sorted(CONTRADICTIONS))
def test_a_config_that_contradicts_its_weights_names_both_values(tmp_path: Path, family: str) -> None:
    key, was, becomes = CONTRADICTIONS[family]
    folder = tiny_model(tmp_path / "model", family, layers=4)
    edited(folder, **{key: becomes})
    fused = 2 if key in ("shared_intermediate_size", "intermediate_size") else 1
    said = refused(folder)
    got, expected = said.split("; got ")[1].split("expected ")
    assert str(fused * was) in got and str(fused * becomes) in expected


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_a_model_that_needs_code_of_its_own_is_refused(tmp_path: Path, family: str) -> None:
    folder = tiny_model(tmp_path / "model", family, layers=4)
    edited(folder, auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
    assert "the model asks to run code of its own (auto_map), which is refused" in refused(folder)
