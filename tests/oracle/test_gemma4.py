"""Gemma 4 E2B and E4B in llama.cpp: shared keys and values, inputs of each layer's own, and a cap of the logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4VisionConfig,
)

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.allocate import predicted_choices
from exporter.compress.checks import with_factors
from exporter.compress.compression import Compression
from exporter.compress.effort import EFFORTS
from exporter.compress.method import load_method
from exporter.foundation.errors import InputError, RequestError
from exporter.model.excerpt import excerpt, excerpt_layers
from exporter.model.folder import save_folder
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model
from exporter.model.widths import outlined
from exporter.pipeline import build
from exporter.planning.job import Job
from exporter.prove.accuracy import Reference, dequantised, distance, divergence
from exporter.targets.artifact import Artifact
from exporter.targets.contract import budgeted, load_target, low_rank, lower, shape_of
from exporter.targets.opened import OpenedArtifact
from tests.float_artifacts import in_float32
from tests.folders import edit, rewrite
from tests.gguf_files import edited_gguf
from tests.models import VOCAB, tensor_digests, tiny_model
from tests.reference import plain_texts

LENGTH, GENERATED = 96, 40
TOKENS = np.random.default_rng(0).integers(2, 300, (2, LENGTH))
# ggml rounds GELU to float16.
MOST_KL = 1e-5
LAYERS = 6
KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
FAMILY: dict[str, Any] = {"layer_types": KINDS, "num_kv_shared_layers": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a multimodal model with the keys and the tensors of published ones."""
    folder = tiny_model(tmp_path_factory.mktemp("gemma4") / "model", "gemma4_text", layers=LAYERS, changes=FAMILY)
    text, decoder = json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / "model.safetensors")
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = Gemma4VisionConfig(**encoder, num_key_value_heads=2, head_dim=16, intermediate_size=48)
    config = Gemma4Config(text_config=text, vision_config=vision, audio_config=Gemma4AudioConfig(**encoder))
    whole = Gemma4ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(
        {name.removeprefix("model."): values for name, values in decoder.items()}
    )
    whole.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    text = {key: value for key, value in written["text_config"].items() if key != "per_layer_config"} | {
        "global_head_dim": 32, "num_global_key_value_heads": None, "expert_intermediate_size": None,
        "use_bidirectional_attention": None, "dtype": "bfloat16",
    }  # fmt: skip
    edit(folder, text_config=text, eos_token_id=[1, 106], vision_soft_tokens_per_image=280, eoa_token_id=258883)
    unused = [f"model.language_model.layers.5.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(32, 64) for name in unused})
    return folder


def logits_of(module: torch.nn.Module) -> Any:
    """Return a function that gives a module's logits from a position on."""

    def logits(tokens: list[int], first: int) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = module(input_ids=torch.tensor([tokens])).logits[0, first:].numpy()
        return found

    return logits


def kl(reference: Reference, path: Path) -> float:
    with OpenedArtifact(Artifact("gguf", path.parent, (path,)), LENGTH, 1, exact=True) as opened:
        return distance(reference, opened.logits).kl_mean


def test_a_float_artifact_is_the_model(tmp_path: Path, folder: Path) -> None:
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(folder)) as model:
        decoder = model.decoder
        assert decoder.key_layers == (None, None, None, 1, 1, 2)
        assert decoder.head_dims == (16, 16, 32) * 2
        assert decoder.intermediate == (96,) * 3 + (192,) * 3
        assert shape_of(decoder).cache_bytes(100, 2) == 2 * 2 * 100 * 2 * (16 + 16 + 32)
        reference = Reference.of(model, TOKENS)
        save_folder(model, tmp_path / "saved")
    whole = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for one in (whole, alone):
        assert distance(reference, logits_of(one)).kl_mean < 1e-9
    prompt = TOKENS[0, : LENGTH - GENERATED].tolist()
    given = torch.tensor([prompt])
    expected = alone.generate(given, max_new_tokens=GENERATED, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with OpenedArtifact(Artifact("gguf", path.parent, (path,)), LENGTH, 1, exact=True) as opened:
        assert distance(reference, opened.logits).kl_mean < MOST_KL
        made = opened.generate(prompt, GENERATED)
    assert made == expected[0, len(prompt) :].tolist()[: len(made)]
    assert len(made) == GENERATED or {1, 106} & set(expected[0, len(prompt) :].tolist())


@pytest.mark.parametrize("cap", [None, 5.0])
def test_only_the_rounding_of_gelu_differs(tmp_path: Path, cap: float | None) -> None:
    """Without a cap, the file must say so: llama.cpp assumes one."""
    changes = FAMILY | {"final_logit_softcapping": cap}
    folder = tiny_model(tmp_path / "model", "gemma4_text", layers=LAYERS, changes=changes)
    gates = ("mlp.gate_proj.weight", "per_layer_input_gate.weight")
    rewrite(folder, lambda held: {name: 0 * one if name.endswith(gates) else one for name, one in held.items()})
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    with open_model(str(folder)) as model:
        assert kl(Reference.of(model, TOKENS), path) < 1e-10


def test_each_part_matters(tmp_path: Path, folder: Path) -> None:
    """What the first test would miss if llama.cpp took its defaults, or took tensors for others."""
    path = in_float32(folder, "gguf", tmp_path / "artifact").weights[0]
    held = {tensor.name: np.array(tensor.data) for tensor in open_gguf(path).tensors}
    with open_model(str(folder)) as model:
        reference = Reference.of(model, TOKENS)
    wrong: list[tuple[dict[str, object], dict[str, np.ndarray]]] = [
        ({"gemma4.final_logit_softcapping": 0.0}, {}),
        ({"gemma4.attention.sliding_window": LENGTH}, {}),
        ({"gemma4.rope.freq_base_swa": 1e6}, {}),
        ({}, {"rope_freqs.weight": np.ones(16, np.float32)}),
        ({}, {"per_layer_token_embd.weight": np.roll(held["per_layer_token_embd.weight"], 32, 1)}),
        ({}, {"per_layer_model_proj.weight": np.roll(held["per_layer_model_proj.weight"], 32, 0)}),
        ({}, {"per_layer_proj_norm.weight": np.ones(32, np.float32)}),
        ({}, {"blk.4.layer_output_scale.weight": np.ones(1, np.float32)}),
        ({}, {"blk.4.post_norm.weight": held["blk.3.post_norm.weight"]}),
        ({}, {"blk.1.attn_k.weight": held["blk.0.attn_k.weight"]}),
    ]
    for number, (keys, tensors) in enumerate(wrong):
        file = edited_gguf(path, tmp_path / f"{number}.gguf", keys, tensors)
        assert kl(reference, file) > 10 * MOST_KL, (keys, list(tensors))


def test_an_excerpt_has_what_its_layers_attend_to(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with open_model(str(folder)) as model:
        part = excerpt(model)
        assert excerpt_layers(model.decoder) == (0, 1, 2, 4, 5)
        assert part.decoder.key_layers == (None, None, None, 1, 2)
        assert part.read("model.embed_tokens_per_layer.weight").shape == (VOCAB, 5 * 32)
        reference = Reference.of(part, TOKENS)
        artifact = load_target("gguf").write_float(part, tmp_path / "artifact")
        save_folder(part, tmp_path / "saved")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    with torch.inference_mode():
        expected = whole(torch.from_numpy(TOKENS[:1])).logits[0]
    torch.testing.assert_close(reference.logits(0, slice(None)), expected, rtol=0, atol=1e-4)
    assert kl(reference, artifact.weights[0]) < MOST_KL


def test_layers_of_other_widths(tmp_path: Path, folder: Path) -> None:
    """A pruned model has a width for each layer in the file, and zeros in a folder, which can state one alone."""
    (tmp_path / "artifact").mkdir()
    widths = (96, 64, 96, 32, 160, 192)
    with open_model(str(folder)) as model:
        pruned = outlined(model, widths)
        reference = Reference.of(pruned, TOKENS)
        artifact = load_target("gguf").write_float(pruned, tmp_path / "artifact")
        save_folder(pruned, tmp_path / "saved")
    assert kl(reference, artifact.weights[0]) < MOST_KL
    with open_model(str(tmp_path / "saved")) as padded:
        assert padded.decoder.intermediate == model.decoder.intermediate
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert distance(reference, logits_of(whole)).kl_mean < 1e-9


def test_the_divergence_that_a_change_of_a_table_causes_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", "gemma4_text", layers=3, tied=False)
    windows = Windows.of(np.random.default_rng(2).integers(2, 200, (16, 64)), "file", 0)
    with open_model(str(folder)) as model:
        statistics, tables = collect(model, windows, 0, silent), model.decoder.tables
        before = Reference.of(model, windows.tokens)
    original = load_file(folder / "model.safetensors")
    for table in tables:
        change = 3e-3 * torch.randn(table.rows, table.columns, generator=torch.Generator().manual_seed(0))
        changed = original | {table.name: original[table.name] + change}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with open_model(str(folder)) as model:
            after = Reference.of(model, windows.tokens)
        pairs = ([one.logits(window, slice(None)).numpy() for one in (before, after)] for window in range(16))
        measured = np.mean([divergence(*pair).mean() for pair in pairs])
        frequencies, columns = statistics.lookups(table.role)
        predicted = 0.5 * float(frequencies @ (change.numpy() ** 2 @ columns))
        assert predicted == pytest.approx(measured, rel=0.25), table.role


def test_interrupted_statistics_go_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers hand to later ones, and gradients at their own inputs, are there again."""

    def stop(done: int, total: int) -> None:
        if done == total - 2:
            raise KeyboardInterrupt

    windows = Windows.of(TOKENS[:, :40], "file", 0)
    with open_model(str(tiny_model(tmp_path / "model", "gemma4_text", layers=5))) as model:
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "resumed"))
        with pytest.raises(KeyboardInterrupt):
            collect(model, windows, 0, stop)
        collect(model, windows, 0, silent)
        monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "straight"))
        collect(model, windows, 0, silent)
    resumed, straight = (sorted((tmp_path / name).rglob("*.np*")) for name in ("resumed", "straight"))
    assert [path.name for path in resumed] == [path.name for path in straight]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(resumed, straight, strict=True))
    assert not [path.name for path in straight if path.name.startswith(("inputs", "own", "gradient"))]


def test_factors_beside_each_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "artifact").mkdir()
    target, windows = load_target("gguf"), Windows.of(TOKENS[:, :64], "file", 0)
    with open_model(str(tiny_model(tmp_path / "model", "gemma4_text", layers=3))) as model:
        decisions = with_factors(target.decide(model, "Q4_0", "rtn"), low_rank(target, 32, 8), None)
        compression = Compression(model, decisions, collect(model, windows, 0, silent))
        artifact = lower(target, compression, "Q4_0", tmp_path / "artifact").artifact
        own = Reference.of(dequantised(model, target.read_back(artifact, model)), TOKENS[:1, :48])
    with OpenedArtifact(artifact, 48, 1, exact=True) as opened:
        assert distance(own, opened.logits).kl_mean < 2e-3
    assert kl(own, artifact.weights[0]) > 2e-2


def with_rows_of_a_part(rows: int, folder: Path, made: Path, patch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    """Return the tensors of a compressed model, and the divergence predicted for each format of the layers' table."""
    patch.setattr("exporter.model.decoder.ROWS_OF_A_PART", rows)
    made.mkdir()
    target, windows = load_target("gguf"), Windows.of(TOKENS[:, :64], "file", 0)
    with open_model(str(folder)) as model:
        assert len(model.decoder.layer_embedding) == -(-VOCAB // rows)
        decisions = target.decide(model, "Q5_0", "ldlq")
        rewritten = target.rewritten(model, collect(model, windows, 0, silent), decisions)
        compression = Compression(
            rewritten.model, decisions, rewritten.statistics, propagation_text=windows.tokens, source=model
        )
        artifact = lower(target, compression, "Q5_0", made).artifact
        read = target.read_back(artifact, rewritten.model)
        assert kl(Reference.of(dequantised(rewritten.model, read), TOKENS), artifact.weights[0]) < 0.1
        table = [one for one in budgeted(target).storages(model) if one.groups[0].role == "layer_embedding"]
        method = load_method("ldlq", EFFORTS["fast"])
        choices = predicted_choices(model, table, method, rewritten.statistics, silent)
    return tensor_digests(artifact.weights[0]), [choice.kl for choice in choices[0]]


def test_a_table_is_compressed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", "gemma4_text", layers=3)
    whole, as_whole = with_rows_of_a_part(VOCAB, folder, tmp_path / "whole", monkeypatch)
    parts, in_parts = with_rows_of_a_part(128, folder, tmp_path / "parts", monkeypatch)
    assert parts == whole
    assert in_parts == pytest.approx(as_whole, rel=1e-4)


def test_a_budget_from_the_source_to_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    calibration, evaluation = plain_texts(tmp_path)
    report = build(
        Job(
            str(folder), "raspberry-pi-5", "gguf", output=tmp_path / "bundle", context=128, window=64, threads=1,
            effort="fast", max_file_bytes=340_000, calibration=calibration, calibration_windows=4,
            evaluation=evaluation, evaluation_windows=4,
        )
    ).report  # fmt: skip
    assert report.passed
    assert report.size.file_bytes.value <= 340_000
    assert {row.role for row in report.tensors} >= {"layer_embedding", "input_gate", "input_projection", "q", "down"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_moe_block": True}, "config.json sets 'enable_moe_block', which no target carries"),
        ({"attention_k_eq_v": True}, "config.json sets 'attention_k_eq_v', which no target carries"),
        ({"hidden_size_per_layer_input": 0}, "the layers have no inputs of their own"),
        ({"vocab_size_per_layer_input": 300}, "the table of the layers' own inputs has other tokens than the vocabula"),
        ({"num_kv_shared_layers": 4}, "no layer of some kind of attention has keys and values of its own"),
        ({"num_kv_shared_layers": 6}, "no layer of some kind of attention has keys and values of its own"),
        ({"use_bidirectional_attention": "all"}, "config.json sets 'use_bidirectional_attention', which no target"),
        ({"per_layer_config": {"2": {"skip": ["mlp"]}}}, "config.json has no usable 'per_layer_config'"),
        ({"per_layer_config": {"2": {"head_dim": 64}}}, "the rotary embeddings cannot be computed"),
        (
            {"per_layer_config": {layer: {"head_dim": 32} for layer in "025"}},
            "layers of one kind have heads of several widths; got full_attention 32, sliding_attention 16",
        ),
        ({"per_layer_config": {"99": {"head_dim": 64}}}, "transformers cannot read the config"),
        ({"final_logit_softcapping": -1.0}, "config.json has no usable 'final_logit_softcapping'"),
    ],
)
def test_what_is_not_carried_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = edit(tiny_model(tmp_path / "model", "gemma4_text", layers=LAYERS, changes=FAMILY), **changes)
    with pytest.raises(InputError) as refused, open_model(str(folder)):
        pass
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_shared_layers": 2}, "got full_attention, sliding_attention, expected sliding_attention, full_atten"),
        ({"global_head_dim": 8}, "'gemma4' has another value built in; got 8, expected head_dim, 16, or more"),
        (
            {"layer_types": ["full_attention"] * LAYERS, "global_head_dim": 16},
            "got full_attention, expected sliding_attention and full_attention",
        ),
    ],
)
def test_what_llama_cpp_takes_otherwise_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tiny_model(tmp_path / "model", "gemma4_text", layers=LAYERS, changes=FAMILY | changes)
    with open_model(str(folder)) as model, pytest.raises(RequestError, match=message):
        load_target("gguf").decide(model, "F32", "rtn")
