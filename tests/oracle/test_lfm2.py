"""LFM2 in both runtimes: convolutions beside attention, as a published config.json describes them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Lfm2Config, Lfm2ForCausalLM

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.checks import with_factors
from exporter.compress.compression import Compression
from exporter.foundation.errors import InputError, RequestError
from exporter.model.excerpt import excerpt
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model
from exporter.pipeline import build
from exporter.planning.job import Job
from exporter.prove.accuracy import Reference, dequantised, distance
from exporter.prove.lowering import Decoded, check_weights
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, low_rank, lower, shape_of
from exporter.targets.onnx.intake import INTAKE
from exporter.targets.onnx.settings import CONFIGURATION
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import continued, in_float32, logits_by_transformers
from tests.gguf_files import edited_gguf
from tests.models import tiny_model
from tests.reference import plain_texts

# A prompt is longer than what onnxruntime-genai processes at once, so that a chunk begins with a convolution's state.
LENGTH, GENERATED = 192, 40
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
KERNEL = "blk.0.shortconv.conv.weight"
ENTERING = "blk.0.shortconv.in_proj.weight"
# The keys of published models: the width is 2/3 of `block_ff_dim`, in multiples of 32.
PUBLISHED = {
    "block_auto_adjust_ff_dim": True, "block_dim": 64, "block_ff_dim": 170, "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0, "block_multiple_of": 32, "block_norm_eps": 1e-5, "block_out_init_scale": 1.0,
    "block_use_swiglu": True, "block_use_xavier_init": True, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 64,
    "conv_dim_out": 64, "conv_use_xavier_init": True, "full_attn_idxs": [1, 4], "norm_eps": 1e-5, "num_heads": 4,
    "rope_theta": 1000000.0, "theta": 1000000.0, "tie_embedding": True, "use_pos_enc": True,
}  # fmt: skip
DROPPED = ("head_dim", "intermediate_size", "layer_types", "rope_parameters", "tie_word_embeddings")


def edited(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the keys of published models."""
    made = tiny_model(
        tmp_path_factory.mktemp("lfm2") / "model", "lfm2", layers=6, intermediate=170,
        changes={"block_ffn_dim_multiplier": 1.0},
    )  # fmt: skip
    return edited(made, **dict.fromkeys(DROPPED), **PUBLISHED)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_float_artifact_is_the_model(tmp_path: Path, folder: Path, target: str) -> None:
    artifact = in_float32(folder, target, tmp_path / "artifact")
    with open_model(str(folder)) as model:
        assert model.decoder.intermediate == (128,) * 6
        assert model.decoder.convolutions == (3, None, 3, 3, None, 3)
        reference = Reference.of(model, TOKENS)
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    expected = continued(folder, prompt, GENERATED)
    assert distance(reference, logits_by_transformers(folder)).kl_mean < 1e-9
    with OpenedArtifact(artifact, LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6
        made = opened.generate(prompt, GENERATED)
    assert made == expected[: len(made)]
    assert len(made) == GENERATED or 1 in expected


def test_what_a_convolution_is_made_of_matters(tmp_path: Path, folder: Path) -> None:
    """What the test above would miss if positions, gates or the last norm were mixed up."""
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    held = {tensor.name: np.array(tensor.data) for tensor in open_gguf(path).tensors}
    assert held[KERNEL].shape == (64, 3)
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS[:, :64])
    wrong = {
        "later positions first": {KERNEL: np.ascontiguousarray(held[KERNEL][:, ::-1])},
        "gates change places": {ENTERING: np.roll(held[ENTERING], 64, 0)},
        "another norm before the head": {"token_embd_norm.weight": held["blk.0.ffn_norm.weight"]},
    }
    for number, (what, tensors) in enumerate(wrong.items()):
        file = edited_gguf(path, tmp_path / f"{number}.gguf", {}, tensors)
        with OpenedArtifact(Artifact("gguf", tmp_path, (file,)), LENGTH, 1, exact=True) as opened:
            assert distance(reference, opened.logits).kl_mean > 1e-4, what


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize(("positions", "first"), [(2, "conv"), (5, "full_attention")])
def test_kernels_of_other_widths_and_attention_in_the_first_layer(
    tmp_path: Path, target: str, positions: int, first: str
) -> None:
    changes = {"conv_L_cache": positions, "layer_types": [first, "conv", "full_attention"]}
    folder = tiny_model(tmp_path / "model", "lfm2", layers=3, changes=changes)
    artifact = in_float32(folder, target, tmp_path / "artifact")
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS[:1, :48])
    with OpenedArtifact(artifact, 48, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_an_excerpt_that_begins_and_ends_with_convolutions_has_attention(
    tmp_path: Path, folder: Path, target: str
) -> None:
    (tmp_path / "artifact").mkdir()
    with open_model(str(folder)) as model:
        part = excerpt(model)
        assert part.decoder.convolutions == (3, None, 3)
        reference = Reference.of(part, TOKENS[:1, :48])
        artifact = load_target(target).write_float(part, tmp_path / "artifact")
    with OpenedArtifact(artifact, 48, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < 1e-6


def test_only_layers_of_attention_keep_keys_and_values(folder: Path) -> None:
    with open_model(str(folder)) as model:
        assert shape_of(model.decoder).cache_bytes(100, 2) == 2 * 2 * 100 * 2 * 2 * 16


@pytest.mark.parametrize(("target", "most"), [("gguf", 100_000), ("onnx", 270_000)])
def test_a_budget_from_the_source_to_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, most: int
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", "lfm2", layers=3)
    calibration, evaluation = plain_texts(tmp_path)
    report = build(
        Job(
            str(folder), "raspberry-pi-5", target, output=tmp_path / "bundle", context=128, window=64, threads=1,
            effort="fast", max_file_bytes=most, calibration=calibration, calibration_windows=4, evaluation=evaluation,
            evaluation_windows=4,
        )
    ).report  # fmt: skip
    assert report.passed
    assert report.size.file_bytes.value <= most
    assert {row.role for row in report.tensors} >= {"conv_in", "conv_out", "q", "o", "down"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_cache_size": 4}, "the graph has other states of convolutions than the settings"),
        ({"hidden_size": 128}, "the graph has other states of convolutions than the settings"),
        ({"layer_types": ["conv"] * 6}, "the graph has other keys and values than the settings"),
        ({"layer_types": ["conv", "full_attention"]}, "layer_types must name each of the 6 layers"),
        ({"conv_cache_size": None}, "the entries of convolutions must be given together"),
    ],
)
def test_settings_that_do_not_fit_the_graph_are_refused(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    artifact = in_float32(folder, "onnx", tmp_path / "artifact")
    path = artifact.folder / CONFIGURATION
    settings = json.loads(path.read_text("utf-8"))
    decoder = settings["model"]["decoder"] | changes
    settings["model"]["decoder"] = {key: value for key, value in decoder.items() if value is not None}
    path.write_text(json.dumps(settings), "utf-8")
    with pytest.raises(InputError) as refused:
        INTAKE.admit(artifact, (), lambda name, _: (artifact.folder / name).read_bytes(), tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_factors_beside_each_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "artifact").mkdir()
    made, windows = load_target(target), Windows.of(TOKENS[:, :64], "file", 0)
    with open_model(str(tiny_model(tmp_path / "model", "lfm2"))) as model:
        decisions = with_factors(made.decide(model, made.type_of_8_bits, "rtn"), low_rank(made, 32, 8), None)
        compression = Compression(model, decisions, collect(model, windows, 0, silent))
        lowered = lower(made, compression, made.type_of_8_bits, tmp_path / "artifact")
        read = made.read_back(lowered.artifact, model)
        decoded = Decoded(read)
        for group in model.groups():
            decoded(group)
        assert check_weights(decoded.digests, lowered).status == "passed"
        stored = made.stored_types(lowered.artifact, model)
        assert sum("+r32" in name for name in stored.values()) == 5 + 7
        own = Reference.of(dequantised(model, read), TOKENS[:1, :48])
    with OpenedArtifact(lowered.artifact, 48, 1, exact=True) as opened:
        assert distance(own, opened.logits).kl_mean < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_attn_idxs": []}, "got conv, expected conv and full_attention, each at least once"),
        ({"full_attn_idxs": list(range(6))}, "got full_attention, expected conv and full_attention"),
        ({"layer_types": ["conv", "sliding_attention"] * 3}, "got conv, sliding_attention, expected conv and full"),
        ({"layer_types": ["conv", "made up"] * 3}, "transformers cannot read the config"),
        ({"layer_types": ["conv", "full_attention"]}, "transformers cannot read the config"),
        ({"conv_bias": True}, "a Lfm2ForCausalLM with conv_bias=true is not supported"),
        ({"conv_L_cache": 1}, "the convolutions have no earlier position to add"),
        ({"conv_L_cache": 100}, "no usable 'conv_L_cache'; got 100, expected a whole number from 1 to 64"),
        ({"block_ffn_dim_multiplier": 1e30}, "no usable 'intermediate_size'"),
        ({"block_use_swiglu": False}, "config.json sets 'block_use_swiglu', which no target carries"),
        ({"architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe"}, "'Lfm2MoeForCausalLM' is not supported"),
        (
            {"architectures": ["Lfm2VlForConditionalGeneration"], "model_type": "lfm2_vl"},
            "'Lfm2VlForConditionalGeneration' is not supported",
        ),
    ],
)
def test_what_no_runtime_computes_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    usual = {"layer_types": None, "full_attn_idxs": [1, 4]}
    folder = edited(tiny_model(tmp_path / "model", "lfm2", layers=6), **usual | changes)
    with pytest.raises(InputError) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


def test_heads_that_llama_cpp_does_not_load_are_refused(tmp_path: Path) -> None:
    def config(**keys: Any) -> Lfm2Config:
        return Lfm2Config(**keys | {"head_dim": 32})

    kind: tuple[Callable[..., Any], type] = (config, Lfm2ForCausalLM)
    folder = tiny_model(tmp_path / "model", "lfm2", kind=kind)  # type: ignore[arg-type]
    with open_model(str(folder)) as model, pytest.raises(RequestError, match=r"got 4 heads of 32, hidden size 64"):
        load_target("gguf").decide(model, "F32", "rtn")
