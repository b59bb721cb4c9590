"""Keys of config.json: carried exactly to the real runtimes, changing nothing, or refused with key and value."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.foundation.errors import InputError, RequestError
from exporter.model.config_keys import key_table
from exporter.model.sources import open_model
from exporter.planning.job import Job
from exporter.planning.resolve import resolve
from tests.folders import edit, float_kl, transformers_logits
from tests.models import tiny_model

MOST_KL = 1e-6
# Most of the tokens that are compared lie beyond this context.
ORIGINAL = 40
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LEGACY = {"rope_parameters": ..., "rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}


def made(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    hidden = changes.get("hidden_size", 128)
    edit(tiny_model(folder, family, hidden=hidden), **{"sliding_window": None} | changes)
    return folder


@pytest.mark.parametrize(
    ("family", "changes", "targets"),
    [
        ("qwen3", {"rope_parameters": YARN}, ("gguf", "onnx")),
        ("qwen2", LEGACY | {"original_max_position_embeddings": ORIGINAL}, ("gguf", "onnx")),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.3}}, ("gguf", "onnx")),
        ("mistral", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}, ("gguf", "onnx")),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5}}, ("onnx",)),
        ("qwen3", {"rope_parameters": YARN | {"truncate": False}}, ("onnx",)),
        ("mistral", {"rope_parameters": LLAMA3}, ("gguf", "onnx")),
        ("qwen2", {"rope_parameters": LLAMA3}, ("onnx",)),
        ("qwen3", {"rope_parameters": LINEAR}, ("gguf", "onnx")),
        ("qwen2", {"rope_parameters": DYNAMIC}, ("gguf", "onnx")),
        ("qwen3", {"rope_parameters": PROPORTIONAL}, ("onnx",)),
        ("llama", {"hidden_act": "relu"}, ("onnx",)),
        ("mistral", {"hidden_act": "relu2"}, ("onnx",)),
        ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, ("onnx",)),
        ("qwen2", {"hidden_act": "gelu"}, ("onnx",)),
        ("llama", {"hidden_act": "swish", "rms_norm_eps": 0.5}, ("gguf", "onnx")),
    ],
)
def test_what_is_honoured_is_exact(
    tmp_path: Path, family: str, changes: dict[str, Any], targets: tuple[str, ...]
) -> None:
    plain, changed = made(tmp_path / "plain", family, {}), made(tmp_path / "changed", family, changes)
    if changes.get("rope_parameters") is not DYNAMIC:
        assert np.abs(transformers_logits(plain) - transformers_logits(changed)).max() > 1e-3
    for target in targets:
        assert float_kl(changed, target) < MOST_KL


def test_a_matrix_with_as_many_rows_as_tokens_is_not_taken_for_the_head(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3", hidden=320, intermediate=320, tied=False)
    assert float_kl(folder, "onnx") < MOST_KL


@pytest.mark.parametrize(
    ("family", "changes", "target", "match"),
    [
        ("llama", {"hidden_act": "relu"}, "gguf", r"hidden_act: .* got 'relu', expected 'silu'; use --target onnx"),
        ("mistral", {"hidden_act": "gelu"}, "gguf", "got 'gelu', expected 'silu'; use --target onnx"),
        ("qwen2", {"rope_parameters": LLAMA3}, "gguf", "'qwen2' has no rotary .* 'llama3'; .* use --target onnx"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "gguf", "truncate false.* use --target onnx"),
        ("qwen3", {"rope_parameters": YARN | {"beta_fast": 4, "beta_slow": 2}}, "gguf", "beta_fast 4, beta_slow 2"),
        ("qwen2", {"head_dim": 32, "num_attention_heads": 2}, "gguf", "got 2 heads of 32, hidden size 128"),
        ("qwen3", {"head_dim": 24}, "onnx", "head_dim: .* got 24, expected a multiple of 16; use --target gguf"),
        ("llama", {"head_dim": 20}, "onnx", "got 20, expected a multiple of 16; use --target gguf"),
        ("mistral", {"head_dim": 8}, "onnx-qdq", "got 8, expected a multiple of 16; use --target gguf"),
    ],
)
def test_what_a_runtime_lacks_is_refused_at_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], target: str, match: str
) -> None:
    monkeypatch.setattr("exporter.model.decoder.Decoder.check_shapes", lambda *_: None)
    folder = made(tmp_path / "model", family, changes)
    with open_model(str(folder)) as model, pytest.raises(RequestError, match=match):
        resolve(Job(str(folder), "raspberry-pi-5", target, context=64), model).draft()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"logit_scale": 0.0625}, r"sets 'logit_scale', .*; got 0.0625, expected 1.0; remove it from config.json if"),
        ({"attn_temperature_tuning": 4}, "sets 'attn_temperature_tuning', .* got 4, expected no such key"),
        ({"final_logit_softcapping": 30.0}, "sets 'final_logit_softcapping'"),
        ({"attention_multiplier": 0.5}, "sets 'attention_multiplier'"),
        ({"rope_interleaved": True}, "sets 'rope_interleaved'"),
        ({"use_mrope": True}, "sets 'use_mrope'"),
        ({"is_causal": False}, "sets 'is_causal', .* got False, expected True"),
        ({"partial_rotary_factor": 0.5}, "sets 'partial_rotary_factor'"),
        ({"transformers_weights": "other.safetensors"}, "sets 'transformers_weights'"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, "sets 'per_layer_config'"),
        ({"hidden_act": "fatrelu"}, "no usable 'hidden_act'; got 'fatrelu', expected an activation that a target"),
        ({"rope_scaling": {"type": "mrope", "factor": 4.0}}, "type 'mrope' are not supported"),
        ({"rope_scaling": {"type": "proportional", "factor": 4.0}}, "'factor' in rope_scaling, .* got 4.0"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "'factor' in rope_parameters, .* got 8.0"),
        ({"rope_parameters": LINEAR | {"attention_factor": 0.5}}, "'attention_factor' in rope_parameters"),
        ({"rope_parameters": YARN | {"long_factor": [1.0]}}, "'long_factor' in rope_parameters"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, "the rotary embeddings cannot be computed"),
        ({"model_type": "qwen2"}, "the architecture 'LlamaForCausalLM' and the model_type 'qwen2'"),
    ],
)
def test_what_nothing_carries_is_refused_when_the_source_is_opened(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    folder = made(tmp_path / "model", "llama", changes)
    with pytest.raises(InputError, match=match), open_model(str(folder)):
        pass


def test_inert_keys_change_nothing(tmp_path: Path) -> None:
    plain, folder = made(tmp_path / "plain", "llama", {}), made(tmp_path / "model", "llama", {})
    # No value of any type is good for all of them: these are taken by transformers, and are not what it has by default.
    values: dict[str, object] = dict.fromkeys(key_table()["inert"]["names"], 0.25) | {
        "attn_implementation": None, "bad_words_ids": [[5]], "cache_implementation": None, "chunk_size_feed_forward": 2,
        "dtype": "float16", "id2label": {"0": "a", "1": "b", "2": "c"}, "is_decoder": True, "is_llama_config": True,
        "label2id": {"a": 0}, "name_or_path": "x", "output_attentions": False, "output_hidden_states": True,
        "pretraining_tp": 2, "prefix": "x", "problem_type": "regression", "return_dict": True, "tokenizer_class": None,
        "torch_dtype": "bfloat16", "transformers_version": "4.9", "use_cache": False, "decoder_start_token_id": 3,
        "task_specific_params": {"x": {"max_length": 3}}, "sep_token_id": 4, "unk_token_id": 5,
    }  # fmt: skip
    others = {"_attn_implementation_autoset": True, "unsloth_fixed": True, "attention_dropout": 0.5, "embd_pdrop": 0.1}
    harmless = {"rope_interleaved": False, "use_mrope": False, "logit_scale": None, "extra": []}
    known = key_table()["inert"]["names"]
    edit(folder, **values | others | harmless, num_labels=7)
    assert set(known) <= set(json.loads((folder / "config.json").read_text()))
    np.testing.assert_array_equal(transformers_logits(plain), transformers_logits(folder))
    with open_model(str(plain)) as one, open_model(str(folder)) as other:
        assert one.config.to_dict() == other.config.to_dict()
        assert not other.warnings


def test_a_note_says_where_dynamic_scaling_would_begin(tmp_path: Path) -> None:
    with open_model(str(made(tmp_path / "model", "qwen3", {"rope_parameters": DYNAMIC}))) as model:
        (note,) = model.warnings
    assert "beyond 1024 positions" in note


@pytest.mark.parametrize(
    ("family", "changes", "context"),
    [
        ("mistral", {"sliding_window": 256}, 256),
        ("mistral", {"sliding_window": 256, "use_sliding_window": False}, 256),
        ("mistral", {"sliding_window": 1024}, 1024),
        ("mistral", {"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, 1024),
        ("mistral", {"sliding_window": None}, 1024),
        ("llama", {"sliding_window": 256, "use_sliding_window": False, "max_window_layers": 1}, 1024),
        ("llama", {"sliding_window": 256}, 256),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": False, "max_window_layers": 0}, 1024),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 2}, 1024),
        ("qwen2", {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 1, "layer_types": ...}, 256),
        ("qwen3", {"sliding_window": 256, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 1024),
        ("qwen3", {"max_position_embeddings": 4_194_304}, 4_194_304),
    ],
)
def test_windows_shorten_the_context_where_transformers_has_them(
    tmp_path: Path, family: str, changes: dict[str, Any], context: int
) -> None:
    folder = edit(tiny_model(tmp_path / "model", family), **changes)
    with open_model(str(folder)) as model:
        assert model.decoder.context_length == context


def test_windows_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "qwen3")
    for changes in (
        {"layer_types": ["sliding_attention"] * 2},
        {"layer_types": ["chunked_attention"] * 2},
        {"layer_types": ["full_attention"]},
        {"max_position_embeddings": 2**31},
    ):
        edit(folder, **{"layer_types": None, "max_position_embeddings": 1024} | changes)
        with pytest.raises(InputError), open_model(str(folder)):
            pass
