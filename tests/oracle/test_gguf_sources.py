"""GGUF sources against llama.cpp: what the file says is read, and what cannot be read is refused by name."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from exporter.foundation.errors import InputError
from exporter.model import excerpt, gguf_names
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.build_footprint import float_copy_bytes
from exporter.prove.accuracy import divergence
from exporter.prove.source_check import check_source
from exporter.targets.artifact import Artifact
from exporter.targets.opened import OpenedArtifact
from tests.converter_lists import CASES, UNTIED_ONLY, converted, make_model, with_converted_keys
from tests.float_artifacts import logits_by_transformers
from tests.gguf_files import edited_gguf, float_gguf, lowered, split_gguf
from tests.models import TEXT, tensor_digests, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 300, (2, 160))
HEAD_DIM = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One F32 file of each GGUF architecture, by name; `deep` is a llama of four layers."""
    root = tmp_path_factory.mktemp("files")
    made = {name: tiny_model(root / name, name, tied=name != "qwen2") for name in ("llama", "qwen2", "qwen3")}
    made["deep"] = tiny_model(root / "deep", layers=4, tied=False)
    return {name: float_gguf(folder, root / f"{name}.gguf") for name, folder in made.items()}


def checked(path: Path, folder: Path) -> float:
    """Return the KL that llama.cpp finds; raise where a source is refused."""
    with open_model(str(path)) as model:
        (check,) = check_source(model, TOKENS, 1, folder)
        assert not list(folder.glob(".source*"))
        return float(check.value or 0)


def llama_cpp_logits(path: Path) -> np.ndarray:
    with OpenedArtifact(Artifact("gguf", path.parent, (path,)), 160, 1, exact=True) as child:
        return np.asarray(child.logits(TOKENS[0].tolist(), 80))


def changes_the_function(one: Path, other: Path) -> bool:
    return bool(divergence(llama_cpp_logits(one), llama_cpp_logits(other)).mean() > 1e-4)


def llama3_factors(factor: float, low: float, high: float, original: float, base: float = 10000.0) -> np.ndarray:
    """Return the factors as converters compute them."""
    frequencies = 1.0 / (base ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM))
    found = []
    for wave in (2 * math.pi / frequency for frequency in frequencies):
        kept = min(max((original / wave - low) / (high - low), 0), 1)
        found.append(1 / ((1 - kept) / factor + kept))
    return np.array([float(value) for value in found], np.float32)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}


@pytest.mark.parametrize(
    ("base", "keys", "expected"),
    [
        ("llama", {}, {"rope_type": "default"}),
        ("llama", {"rope.freq_base": None}, {"rope_type": "default", "rope_theta": 10000.0}),
        ("llama", {"rope.freq_base": 500000.0}, {"rope_theta": 500000.0}),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ("llama", {"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ("llama", YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        # As in files of OLMo 3.
        ("llama", YARN | {"rope.scaling.yarn_attn_factor": 1.138629436111989}, {"rope_type": "yarn", "factor": 4.0}),
        ("qwen3", YARN | {"rope.scaling.attn_factor": 1.2}, {"attention_factor": 1.2 * (1 + 0.1 * math.log(4))}),
        (
            "qwen2",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0},
            {"original_max_position_embeddings": 1024},
        ),
        ("qwen2", {"rope.scaling.factor": 3.0, "use_parallel_residual": True}, {"rope_type": "linear", "factor": 3.0}),
    ],
)
def test_keys_of_the_rotary_embedding_are_read(
    files: dict[str, Path], tmp_path: Path, base: str, keys: dict[str, object], expected: dict[str, object]
) -> None:
    whole = {f"{base}.{key}": value for key, value in keys.items()}
    path = edited_gguf(files[base], tmp_path / "source.gguf", whole)
    with open_model(str(path)) as model:
        held = model.config.rope_parameters
        assert {key: held[key] for key in expected} == pytest.approx(expected)
    assert checked(path, tmp_path) < 1e-9


@pytest.mark.parametrize(
    "parameters", [(8.0, 1.0, 4.0, 64), (3.5, 1.5, 5.0, 100), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 64.0, 5000)]
)
def test_frequency_factors_become_llama3_scaling(
    files: dict[str, Path], tmp_path: Path, parameters: tuple[float, float, float, float]
) -> None:
    factors = llama3_factors(*parameters)
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {}, {"rope_freqs.weight": factors})
    with open_model(str(path)) as model:
        assert model.config.rope_parameters["rope_type"] == "llama3"
    assert checked(path, tmp_path) < 1e-9
    assert changes_the_function(path, files["llama"])


def test_a_gguf_file_of_a_scaled_model_is_lowered_to_both_targets(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    first = edited_gguf(
        float_gguf(folder, tmp_path / "plain.gguf"), tmp_path / "first.gguf", {},
        {"rope_freqs.weight": llama3_factors(8.0, 1.0, 4.0, 64)},
    )  # fmt: skip
    expected = llama_cpp_logits(first)
    for target in ("gguf", "onnx"):
        artifact = lowered(first, tmp_path / target, target, "F32")
        with OpenedArtifact(artifact, 160, 1, exact=True) as child:
            got = np.asarray(child.logits(TOKENS[0].tolist(), 80))
        assert divergence(expected, got).mean() < 1e-9


def test_the_check_sees_a_rotary_embedding_that_was_lost(files: dict[str, Path], tmp_path: Path) -> None:
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {f"llama.{key}": value for key, value in YARN.items()})
    with open_model(str(path)) as model:
        config = model.own_config()
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        wrong = replace(model, config=config)
        with pytest.raises(InputError, match=r"source\.gguf: the GGUF file is not read as the model .* got KL"):
            check_source(wrong, TOKENS, 1, tmp_path)
    assert not list(tmp_path.glob(".source*"))


def test_the_check_sees_rows_in_another_order(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_names, "interleaved_rows", lambda rows, heads: np.arange(rows))
    with pytest.raises(InputError, match=r"source\.gguf"):
        checked(files["llama"], tmp_path)


def test_of_a_large_model_the_first_and_last_layer_are_checked(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(excerpt, "WHOLE_PARAMETERS", 1)
    keys = {"llama.feed_forward_length": [96] * 4, **{f"llama.{key}": value for key, value in YARN.items()}}
    path = edited_gguf(files["deep"], tmp_path / "source.gguf", keys)
    with open_model(str(path)) as model:
        (check,) = check_source(model, TOKENS, 1, tmp_path)
        assert "first and last layer" in check.detail
        assert float_copy_bytes(model) < 4 * model.decoder.parameters

        def damaged(name: str) -> np.ndarray:
            return 1.01 * model.read(name) if name == "model.layers.3.mlp.up_proj.weight" else model.read(name)

        with pytest.raises(InputError, match=r"source\.gguf"):
            check_source(replace(model, tensors=Changed(model, damaged)), TOKENS, 1, tmp_path)


class Changed:
    """The tensors of a model, read by another function."""

    def __init__(self, model: Model, read: object) -> None:
        self.files, self.shapes, self.read = model.tensors.files, model.tensors.shapes, read


@pytest.mark.parametrize("type", ["Q4_0", "Q6_K", "BF16"])
def test_quantised_files_are_read_as_llama_cpp_decodes_them(tmp_path: Path, type: str) -> None:
    folder = tiny_model(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    path = lowered(folder, tmp_path / "artifact", "gguf", type).weights[0]
    assert checked(path, tmp_path) < 1e-9


def test_a_sliding_window_makes_a_mistral(files: dict[str, Path], tmp_path: Path) -> None:
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {"llama.attention.sliding_window": 200})
    with open_model(str(path)) as model:
        assert model.decoder.family.architecture == "MistralForCausalLM"
        assert model.decoder.context_length == 200
    assert checked(path, tmp_path) < 1e-9
    path = edited_gguf(files["qwen2"], tmp_path / "other.gguf", {"qwen2.attention.sliding_window": 200})
    with open_model(str(path)) as model:
        assert model.decoder.context_length == 200


def test_the_window_of_a_phi_3_is_read_and_shortens_its_context(tmp_path: Path) -> None:
    plain = float_gguf(tiny_model(tmp_path / "hf", "phi3"), tmp_path / "plain.gguf")
    path = edited_gguf(plain, tmp_path / "source.gguf", {"phi3.attention.sliding_window": 200})
    with open_model(str(path)) as model:
        assert model.config.sliding_window == model.decoder.window == model.decoder.context_length == 200


def test_values_that_change_nothing_are_accepted(files: dict[str, Path], tmp_path: Path) -> None:
    keys: dict[str, object] = {
        "attention.causal": True, "expert_count": 0, "expert_used_count": 0, "attention.scale": 0.0, "logit_scale": 1.0,
        "pooling_type": 0, "vocab_size": 7, "tensor_data_layout": "Meta AI", "rope.scaling.finetuned": True,
        "rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "feed_forward_length": [96, 96],
        "attention.head_count_kv": [2, 2], "hidden_activation": "silu", "attention.clamp_kqv": 0.0,
    }  # fmt: skip
    ones = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    others = {"general.sampling.temp": 0.5, "somebody.note": "x"}
    whole = {f"llama.{key}": value for key, value in keys.items()} | others
    assert checked(edited_gguf(files["llama"], tmp_path / "source.gguf", whole, ones), tmp_path) < 1e-9


SOURCES: dict[str, dict[str, object]] = {
    "granite": {"rms_norm_eps": 1e-5},
    "granitemoehybrid": {"position_embedding_type": None},
    "lfm2": {},
    # The texts are long enough for queries to grow.
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "olmo2": {},
    "olmo3": {},
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {},
    # Of four layers, the last has no rotary embedding.
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}


@pytest.mark.parametrize("family", sorted(SOURCES))
def test_files_of_more_families_are_read_back_as_the_model(tmp_path: Path, family: str) -> None:
    changes = {"head_dim": HEAD_DIM} | SOURCES[family]
    folder = tiny_model(tmp_path / "hf", family, layers=4, tied=family not in UNTIED_ONLY, changes=changes)
    path = float_gguf(folder, tmp_path / "model.gguf")
    with open_model(str(folder)) as own, open_model(str(path)) as read:
        assert read.decoder == own.decoder
        for name in own.decoder.tensors():
            np.testing.assert_array_equal(read.read(name), own.read(name))
        for text in TEXT:
            assert load_tokenizer(read.folder).ids(text) == load_tokenizer(folder).ids(text)
        (check,) = check_source(read, TOKENS, 1, tmp_path)
        assert float(check.value or 0) < 1e-9
        (tmp_path / "saved").mkdir()
        read.own_config().save_pretrained(tmp_path / "saved")
        saved = AutoConfig.from_pretrained(tmp_path / "saved")
        expected = logits_by_transformers(folder)(TOKENS[0].tolist(), 80)
    whole = AutoModelForCausalLM.from_config(saved, dtype=torch.float32).eval()
    whole.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())
    with torch.inference_mode():
        got = whole(torch.tensor(TOKENS[:1])).logits[0, 80:].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "keys", "match"),
    [
        ("granitemoehybrid", {"rope.scaling.finetuned": "no"}, "no usable 'granite.rope.scaling.finetuned'; got 'no'"),
        ("granitemoehybrid", {"expert_count": 4}, "granite.expert_count changes what the model computes"),
        (
            "olmo3",
            {"rope.freq_base_swa": 500.0},
            "rope.freq_base_swa is not rope.freq_base, .* got 500.0, expected 1000",
        ),
        (
            "olmo3",
            {"attention.sliding_window_pattern": [True]},
            "sliding_window_pattern'; got .True., expected a flag for",
        ),
        (
            "ministral3",
            {"attention.temperature_scale": 0.0},
            "mistral3.attention.temperature_scale is missing or 0, which",
        ),
        ("ministral3", {"attention.temperature_scale": None}, "mistral3.attention.temperature_scale is missing or 0"),
        ("ministral3", {"rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast changes what the model computes"),
        (
            "ministral3",
            {"rope.scaling.type": "none", "rope.scaling.attn_factor": 1.0},
            "of type 'default' are not supported for 'mistral3'; got rope.scaling.type 'none', expected one of yarn",
        ),
        ("lfm2", {"attention.sliding_window": 64}, "lfm2.attention.sliding_window changes what the model computes"),
        ("lfm2", {"attention.head_count_kv": 2}, "got full_attention, expected conv and full_attention, each at least"),
        (
            "lfm2",
            {"attention.head_count_kv": [0, 2, 0, 1]},
            r"head_count_kv'; got \[0, 2, 0, 1\], expected one number for",
        ),
        (
            "lfm2",
            {"attention.head_count_kv": [0, 2, 0]},
            r"got \[0, 2, 0\], expected a whole number for each of 4 layers",
        ),
        ("lfm2", {"attention.head_count_kv": [0, 0, 2, 0]}, "'lfm2' is not known to use: blk.1.attn_k.weight"),
        ("lfm2", {"shortconv.l_cache": 4}, r"shortconv.conv.weight: .* got \[64, 3\], expected \[64, 4\]"),
        ("lfm2", {"shortconv.l_cache": None}, "no usable 'lfm2.shortconv.l_cache'; got None"),
        ("qwen3_moe", {"expert_used_count": 5}, "no usable 'num_experts_per_tok'; got 5, expected .* from 1 to 4"),
        ("qwen3_moe", {"expert_used_count": None}, "no usable 'qwen3moe.expert_used_count'; got None"),
        ("qwen3_moe", {"expert_count": 3}, r"ffn_gate_inp.weight: .* got \[4, 64\], expected \[3, 64\]"),
        ("qwen3_moe", {"expert_feed_forward_length": 16}, r"got \[4, 32, 64\], expected \[4, 16, 64\]"),
        ("qwen3_moe", {"expert_weights_norm": False}, "expert_weights_norm changes what the model computes"),
        ("qwen3_moe", {"expert_weights_scale": 2.5}, "expert_weights_scale changes what the model computes"),
        (
            "olmo3",
            {"rope.scaling.yarn_attn_factor": 1.2},
            "yarn_attn_factor changes .* got 1.2.*, expected 1.138.* or no",
        ),
        ("smollm3", {"attention.sliding_window": 64}, "smollm3.attention.sliding_window changes what"),
        ("phi3", {"rope.dimension_count": 7}, "the heads do not divide evenly; got .* turn 7, expected .* even widths"),
        ("phi3", {"rope.dimension_count": 18}, "rope.dimension_count is not the width of a head.* got 18, expected 16"),
        ("phi3", {"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor changes what the model computes"),
        (
            "phi3",
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            "of type 'linear' are not supported for 'phi3'; got rope.scaling.type 'linear', expected one of default",
        ),
    ],
)
def test_settings_of_more_families_that_are_not_read_are_refused(
    tmp_path: Path, family: str, keys: dict[str, object], match: str
) -> None:
    folder = tiny_model(tmp_path / "hf", family, layers=4, tied=family not in UNTIED_ONLY, changes=SOURCES[family])
    plain = float_gguf(folder, tmp_path / "plain.gguf")
    architecture = gguf.GGUFReader(plain).fields["general.architecture"].contents()
    path = edited_gguf(plain, tmp_path / "source.gguf", {f"{architecture}.{key}": one for key, one in keys.items()})
    with pytest.raises(InputError, match=match):
        open_model(str(path)).__enter__()


# llama.cpp's own defaults, and what other converters write.
WRITTEN_OTHERWISE: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "ministral3": ("mistral3", {"rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.attn_factor": None}, {}),
    "olmo3": ("olmo2", {"attention.sliding_window_pattern": None, "rope.freq_base_swa": 10000.0}, {}),
    "qwen3_moe": ("qwen3moe", {"expert_feed_forward_length": None}, {"intermediate_size": 64}),
}


@pytest.mark.parametrize("family", sorted(WRITTEN_OTHERWISE))
def test_what_llama_cpp_assumes_is_read_as_it_computes_it(tmp_path: Path, family: str) -> None:
    architecture, keys, changes = WRITTEN_OTHERWISE[family]
    folder = tiny_model(
        tmp_path / "hf", family, layers=4, tied=family not in UNTIED_ONLY, changes=SOURCES[family] | changes
    )
    plain = float_gguf(folder, tmp_path / "plain.gguf")
    path = edited_gguf(plain, tmp_path / "source.gguf", {f"{architecture}.{key}": one for key, one in keys.items()})
    with open_model(str(folder)) as own, open_model(str(path)) as read:
        assert read.decoder == own.decoder
        (check,) = check_source(read, TOKENS, 1, tmp_path)
        assert float(check.value or 0) < 1e-9


@pytest.mark.parametrize("family", ["lfm2", "olmo3", "phi3", "qwen3_moe"])
def test_of_a_large_model_of_these_families_an_excerpt_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(excerpt, "WHOLE_PARAMETERS", 1)
    path = float_gguf(
        tiny_model(tmp_path / "hf", family, layers=5, tied=family not in UNTIED_ONLY), tmp_path / "one.gguf"
    )
    with open_model(str(path)) as model:
        (check,) = check_source(model, TOKENS, 1, tmp_path)
        assert "first and last layer" in check.detail
        assert float(check.value or 0) < 1e-9


@pytest.mark.parametrize("multiplier", [0.5, 2.0])
def test_any_multiplier_of_yarns_factor_is_read(tmp_path: Path, multiplier: float) -> None:
    plain = float_gguf(
        tiny_model(tmp_path / "hf", "ministral3", changes=SOURCES["ministral3"]), tmp_path / "plain.gguf"
    )
    path = edited_gguf(plain, tmp_path / "source.gguf", {"mistral3.rope.scaling.yarn_log_multiplier": multiplier})
    assert checked(path, tmp_path) < 1e-9
    assert changes_the_function(path, plain)


# The converter switches rotary embeddings on in the last, which has none.
CONVERTED = [
    name
    for name, case in CASES.items()
    if case.family in SOURCES and name != "granitemoehybrid without rotary embeddings"
]


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_with_the_converters_keys_is_read(tmp_path: Path, name: str) -> None:
    folder = make_model(CASES[name], tmp_path / "hf")
    path = float_gguf(folder, tmp_path / "plain.gguf")
    path = with_converted_keys(path, tmp_path / "source.gguf", converted()[name])
    with open_model(str(folder)) as own, open_model(str(path)) as read:
        # Granite 4 with rotary embeddings is read as Granite 3, which computes the same.
        assert read.decoder == replace(own.decoder, family=read.decoder.family)
        assert read.decoder.family == own.decoder.family or own.decoder.family.model_type == "granitemoehybrid"
        (check,) = check_source(read, TOKENS, 1, tmp_path)
        assert float(check.value or 0) < 1e-7


LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("keys", "tensors", "match"),
    [
        ({}, {LONG: ONES}, f"the tensor {SHORT} is missing; got {LONG}, expected factors for short"),
        ({}, {LONG: ONES, SHORT: ONES[:7]}, r"short.weight: .* got \[7\], expected \[8"),
        ({}, {LONG: ONES, SHORT: np.zeros(8, np.float32)}, "config.json"),
        ({}, {LONG: ONES, SHORT: np.full(8, np.nan, np.float32)}, "the tensor holds NaN or infinity"),
        (
            {"phi3.rope.scaling.factor": 2.0}, {LONG: ONES, SHORT: ONES},
            f"scales its rotary embedding twice, by {SHORT} and by keys; got rope.scaling.type 'linear' with factor 2",
        ),
        ({}, {"rope_freqs.weight": ONES}, "a tensor that 'phi3' does not use: rope_freqs.weight"),
        ({}, {"blk.0.attn_q.weight": np.ones((64, 64), np.float32)}, "'phi3' is not known to use: blk.0.attn_q.weight"),
        (
            {}, {"blk.1.attn_qkv.weight": np.ones((192, 64), np.float32)},
            r"blk.1.attn_qkv.weight: .* got \[192, 64\], expected \[128, 64\]",
        ),
        ({}, {"blk.1.ffn_up.weight": np.ones((96, 64), np.float32)}, r"ffn_up.weight: .* got \[96, 64\], expected"),
    ],
)  # fmt: skip
def test_factors_and_fused_matrices_of_phi_3_that_do_not_fit_are_refused(
    tmp_path: Path, keys: dict[str, object], tensors: dict[str, np.ndarray], match: str
) -> None:
    plain = float_gguf(tiny_model(tmp_path / "hf", "phi3"), tmp_path / "plain.gguf")
    with pytest.raises(InputError, match=match):
        open_model(str(edited_gguf(plain, tmp_path / "source.gguf", keys, tensors))).__enter__()


@pytest.mark.parametrize("architecture", ["gemma4", "granitehybrid", "lfm2moe", "phimoe"])
def test_files_of_other_families_are_refused_by_name(files: dict[str, Path], tmp_path: Path, architecture: str) -> None:
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {"general.architecture": architecture})
    said = f"the GGUF architecture '{architecture}' is not supported; expected one of gemma3, .*; give the model as a"
    with pytest.raises(InputError, match=said):
        open_model(str(path)).__enter__()


UNSUPPORTED = "changes what the model computes, in a way that is not supported"


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"llama.attention.scale": 0.3}, rf"llama.attention.scale {UNSUPPORTED}; got 0.3.*, expected 0.0 or no such"),
        ({"llama.logit_scale": 0.5}, rf"llama.logit_scale {UNSUPPORTED}"),
        ({"llama.embedding_scale": 12.0}, rf"llama.embedding_scale {UNSUPPORTED}; got 12.0"),
        ({"llama.residual_scale": 0.2}, rf"llama.residual_scale {UNSUPPORTED}"),
        ({"llama.attention.clamp_kqv": 8.0}, rf"llama.attention.clamp_kqv {UNSUPPORTED}"),
        ({"llama.attention.causal": False}, rf"llama.attention.causal {UNSUPPORTED}; got False, expected True"),
        ({"llama.expert_count": 8}, rf"llama.expert_count {UNSUPPORTED}; got 8, expected 0 or no such key"),
        ({"llama.pooling_type": 3}, rf"llama.pooling_type {UNSUPPORTED}"),
        ({"llama.hidden_activation": "gelu"}, rf"llama.hidden_activation {UNSUPPORTED}; got 'gelu', expected 'silu'"),
        ({"llama.rope.scaling.attn_factor": 1.2}, rf"rope.scaling.attn_factor {UNSUPPORTED}; got 1.2"),
        ({"llama.rope.scaling.yarn_beta_fast": 16.0}, rf"yarn_beta_fast {UNSUPPORTED}; got 16.0"),
        ({"llama.rope.scaling.yarn_attn_factor": 1.0}, rf"yarn_attn_factor {UNSUPPORTED}; got 1.0, expected no such"),
        ({"llama.attention.sliding_window_pattern": 4}, "sliding_window_pattern' is not known to change nothing"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is not supported; got 'longrope', expected"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the width of a head.*; got 8, expected 16"),
        ({"llama.attention.value_length": 32}, "value_length is not the width of a head.*; got 32, expected 16"),
        ({"llama.attention.key_length": 32}, "is not the width of a head.*; got 16, expected 32"),
        ({"llama.attention.head_count_kv": [2, 1]}, r"no usable 'llama.attention.head_count_kv'; got \[2, 1\]"),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count is too large; got 4000000000, expected at most 512"),
        ({"llama.feed_forward_length": None}, "no usable 'llama.feed_forward_length'; got None"),
        ({"llama.rope.freq_base": "large"}, "no usable 'llama.rope.freq_base'; got 'large', expected a finite number"),
        ({"llama.rope.freq_base": 0.5}, "rope.freq_base' is not usable; got 0.5"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "no usable 'llama.attention.layer_norm_rms_epsilon'"),
        ({"general.type": "adapter"}, rf"general.type {UNSUPPORTED}; got 'adapter', expected 'model' or no such key"),
        ({"general.architecture": "gemma2"}, "the GGUF architecture 'gemma2' is not supported; expected one of gemma3"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_honoured_is_refused(
    files: dict[str, Path], tmp_path: Path, keys: dict[str, object], match: str
) -> None:
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {"llama.attention.value_length": 16} | keys)
    if "llama.attention.key_length" in keys:
        path = edited_gguf(files["llama"], path, {"llama.attention.value_length": None} | keys)
    with pytest.raises(InputError, match=match), open_model(str(path)):
        pass


def test_yarn_that_both_sides_compute_otherwise_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    # So short an original context that the range of mixed frequencies is turned round.
    keys = {f"llama.{key}": value for key, value in (YARN | {"rope.scaling.original_context_length": 4}).items()}
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", keys | {"llama.rope.freq_base": 1.5})
    with pytest.raises(InputError, match="compute other frequencies for this yarn scaling"), open_model(str(path)):
        pass


@pytest.mark.parametrize(
    ("base", "name", "shape"),
    [
        ("llama", "blk.0.attn_q.bias", (64,)),
        ("llama", "blk.1.attn_output.bias", (64,)),
        ("llama", "blk.1.ffn_up.bias", (96,)),
        ("qwen2", "output.bias", (320,)),
    ],
)
def test_a_tensor_that_llama_cpp_uses_and_the_reader_does_not_is_refused(
    files: dict[str, Path], tmp_path: Path, base: str, name: str, shape: tuple[int, ...]
) -> None:
    bias = np.random.default_rng(1).normal(0, 0.5, shape).astype(np.float32)
    path = edited_gguf(files[base], tmp_path / "source.gguf", {}, {name: bias})
    with pytest.raises(InputError, match=f"a tensor that '{base}' is not known to use: {name}"), open_model(str(path)):
        pass
    assert changes_the_function(path, files[base])


def test_frequency_factors_of_no_llama3_scaling_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    factors = np.linspace(1, 3, HEAD_DIM // 2).astype(np.float32)
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {}, {"rope_freqs.weight": factors})
    with pytest.raises(InputError, match=r"rope_freqs\.weight: no parameters of llama3"), open_model(str(path)):
        pass
    assert changes_the_function(path, files["llama"])
    both: Mapping[str, object] = {"llama.rope.scaling.factor": 2.0}
    path = edited_gguf(
        files["llama"], tmp_path / "both.gguf", both, {"rope_freqs.weight": llama3_factors(8.0, 1, 4, 64)}
    )
    with pytest.raises(InputError, match="scales its rotary embedding twice"), open_model(str(path)):
        pass
    path = edited_gguf(files["qwen3"], tmp_path / "qwen.gguf", {}, {"rope_freqs.weight": factors})
    with pytest.raises(InputError, match=r"'qwen3' does not use: rope_freqs\.weight"), open_model(str(path)):
        pass


@pytest.mark.parametrize("parts", [2, 3])
def test_a_split_file_is_read_whole(files: dict[str, Path], tmp_path: Path, parts: int) -> None:
    paths = split_gguf(files["llama"], tmp_path, parts)
    with open_model(str(paths[0])) as first, open_model(str(paths[-1])) as last, open_model(str(files["llama"])) as one:
        assert first.single_file == last.single_file == paths[0]
        assert first.name == "model"
        assert first.tensors.files == paths
        assert first.digest == last.digest != one.digest
        for group in one.groups():
            np.testing.assert_array_equal(first.read(group.name), one.read(group.name))
    if parts == 3:
        assert checked(paths[0], tmp_path) < 1e-9
        return
    written = lowered(paths[0], tmp_path / "artifact", "gguf", "F32").weights[0]
    assert tensor_digests(written) == tensor_digests(files["llama"])
    assert not [name for name in gguf.GGUFReader(written).fields if name.startswith("split.")]


def test_a_split_file_that_is_not_whole_is_refused_by_name(files: dict[str, Path], tmp_path: Path) -> None:
    paths = split_gguf(files["llama"], tmp_path, 3)
    moved = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(InputError, match=r"name does not say which; expected a name that ends in -00001-of-00003"):
        open_model(str(moved)).__enter__()
    moved.rename(paths[0])
    held = paths[1].read_bytes()
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(InputError, match=r"00002-of-00003\.gguf: .* got part 3 of 3, expected part 2 of 3"):
        open_model(str(paths[0])).__enter__()
    paths[1].write_bytes(held)
    paths[2].unlink()
    with pytest.raises(InputError, match=r"model-00003-of-00003\.gguf: part 3 of 3 of the GGUF file is missing"):
        open_model(str(paths[1])).__enter__()


def test_a_split_file_with_parts_of_two_models_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    paths = split_gguf(files["deep"], tmp_path, 2)
    second = paths[1].read_bytes()
    split_gguf(files["llama"], tmp_path, 2)
    paths[1].write_bytes(second)
    with pytest.raises(InputError, match=r"two parts hold the tensor|do not belong together"):
        open_model(str(paths[0])).__enter__()


def test_a_type_that_cannot_be_decoded_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    codes = {"token_embd.weight": np.zeros((320, 64), np.int8)}
    path = edited_gguf(files["llama"], tmp_path / "source.gguf", {}, codes)
    with pytest.raises(InputError, match="tensors of type I8 cannot be read"), open_model(str(path)):
        pass


def test_the_disk_that_the_check_takes_is_planned(files: dict[str, Path]) -> None:
    with open_model(str(files["llama"])) as model:
        assert float_copy_bytes(model) == 4 * model.decoder.parameters
