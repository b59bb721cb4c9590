"""Both targets against transformers: the same logits in float32, the planned weights in every format."""

from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.calibrate.layer_stream import LayerStream
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.child.process import Child
from exporter.compress.compression import Compression
from exporter.model.gguf_names import gguf_names, interleaved_rows
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.prove.accuracy import Reference, distance
from exporter.prove.lowering import Decoded, check_stored_types, check_weights
from exporter.targets.artifact import Artifact, runtime_of
from exporter.targets.contract import Lowered, load_target, lower
from exporter.targets.gguf.quantise import quantise
from exporter.targets.opened import OpenedArtifact
from tests.models import FAMILIES, VOCAB, tensor_digests, tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (2, 48))


def made_of(model: Model, folder: Path, target: str, type: str, method: str = "rtn") -> Lowered:
    folder.mkdir()
    made = load_target(target)
    statistics = None
    if method == "ldlq":
        statistics = collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)
    compressed = Compression(model, made.decide(model, type, method), statistics)
    return lower(made, compressed, type, folder)


def kl(model: Model, artifact: Artifact) -> float:
    with OpenedArtifact(artifact, 64, 1, exact=True) as child:
        return distance(Reference.of(model, TOKENS), child.logits).kl_mean


def test_kernels_that_crash_are_named_before_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        artifact = made_of(model, tmp_path / "artifact", "gguf", "F32").artifact
    for info, told in ((b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ", True), (b"CPU : AVX2 = 1 | ", False)):
        monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda info=info: info)
        runtime_of(artifact.target)(artifact, 64, 1, False, 1)
        assert ("CFLAGS=-mno-amx-int8" in capfd.readouterr().err) is told


@pytest.mark.parametrize("target", ["gguf", "onnx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_artifact_is_the_model(tmp_path: Path, family: str, target: str) -> None:
    folder = tiny_model(tmp_path / "model", family, tied=family != "mistral")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with open_model(str(folder)) as model:
        streamed = Reference.of(model, TOKENS)
        with torch.inference_mode():
            expected = whole(torch.from_numpy(TOKENS)).logits
        torch.testing.assert_close(streamed.logits(1, slice(0, 48)), expected[1], rtol=0, atol=2e-5)
        artifact = made_of(model, tmp_path / "artifact", target, "F32").artifact
        assert kl(model, artifact) < 1e-6
        with OpenedArtifact(artifact, 64, 1) as child:
            greedy = child.generate(TOKENS[0, :8].tolist(), 32)
    prompt = torch.from_numpy(TOKENS[:1, :8])
    made = whole.generate(prompt, max_new_tokens=32, do_sample=False, attention_mask=torch.ones_like(prompt))[0, 8:]
    ids = made.tolist()
    assert greedy == (ids[: ids.index(1)] if 1 in ids else ids)


@pytest.mark.parametrize(
    ("target", "type", "method"),
    [("gguf", "Q8_0", "rtn"), ("gguf", "Q4_0", "ldlq"), ("onnx", "int4", "ldlq"), ("onnx", "int8", "rtn"),
     ("onnx", "int4-b16-asymmetric", "rtn"), ("onnx", "int4-b32-f32", "rtn")],
)  # fmt: skip
@pytest.mark.parametrize("family", ["gemma3_text", "llama", "qwen2", "qwen3"])
def test_the_artifact_holds_the_planned_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, target: str, type: str, method: str
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    with open_model(str(tiny_model(tmp_path / "model", family, tied=family != "qwen2"))) as model:
        lowered = made_of(model, tmp_path / "artifact", target, type, method)
        artifact = lowered.artifact
        made = load_target(target)
        assert check_weights(decoded_digests(artifact, model), lowered).status == "passed"
        assert check_stored_types(made, lowered).status == "passed"
        again = made_of(model, tmp_path / "again", target, type, method).artifact
        for one, other in zip(artifact.weights, again.weights, strict=True):
            assert one.read_bytes() == other.read_bytes()
        flip(artifact.weights[-1])
        assert check_weights(decoded_digests(artifact, model), lowered).status == "failed"


def decoded_digests(artifact: Artifact, model: Model) -> dict[str, str]:
    decoded = Decoded(load_target(artifact.target).read_back(artifact, model))
    for group in model.groups():
        decoded(group)
    return decoded.digests


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # ONNX data begins with matrices and ends with rotary tables; a GGUF file begins with its header.
    data[1000 if path.suffix == ".data" else len(data) * 2 // 3] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("hidden", [256, 64])
@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_named_mixes_are_those_of_llama_cpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mix: str, hidden: int
) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    folder = tiny_model(tmp_path / "model", hidden=hidden, intermediate=256 if hidden == 256 else 96, layers=4)
    with open_model(str(folder)) as model:
        statistics = collect(model, Windows.of(TOKENS, "file", 0), 0, lambda done, total: None)
        target = load_target("gguf")
        (tmp_path / "ours").mkdir()
        compressed = Compression(model, target.decide(model, mix, "rtn"), statistics)
        ours = lower(target, compressed, mix, tmp_path / "ours").artifact.weights[0]
        floats = made_of(model, tmp_path / "float", "gguf", "F32").artifact
        names = gguf_names(model.decoder)
        importance = {names[group.name]: statistics.importance(group.site) for group in model.groups()}
    stock = tmp_path / "stock.gguf"
    with Child("llama.cpp", 1 << 30) as child:
        assert child.run(quantise, 120, floats.weights[0], stock, mix, importance) == (0, "")
    assert tensor_digests(ours) == tensor_digests(stock)


def swap_nibbles(codes: np.ndarray, scales: np.ndarray) -> None:
    codes[:] = (codes << 4) | (codes >> 4)


def shift_scales(codes: np.ndarray, scales: np.ndarray) -> None:
    scales[:] = np.roll(scales, 1, axis=0)


def unpermute(codes: np.ndarray, scales: np.ndarray) -> None:
    """Move rows between the order of Hugging Face and that of llama.cpp, as if it had been forgotten or done twice."""
    order = interleaved_rows(len(codes), 4)
    codes[:], scales[:] = codes[order], scales[order]


Parts = tuple[np.ndarray, np.ndarray]


def gguf_parts(artifact: Artifact, query: bool) -> Parts:
    """Return codes and scales of Q4_0 rows, views of the file: [rows, blocks, bytes]."""
    name = "blk.1.attn_q.weight" if query else "blk.1.ffn_down.weight"
    (tensor,) = (t for t in gguf.GGUFReader(artifact.weights[0], "r+").tensors if t.name == name)
    blocks = tensor.data.reshape(len(tensor.data), -1, 18)
    return blocks[:, :, 2:], blocks[:, :, :2]


def onnx_parts(artifact: Artifact, query: bool) -> Parts:
    """Return codes and scales of int4 rows, views of the file: [rows, blocks, bytes] and [rows, blocks]."""
    stem = "model.layers.1.attn.qkv_proj.MatMul" if query else "model.layers.1.mlp.down_proj.MatMul"
    graph = onnx.load_model(str(artifact.weights[0]), load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.name.startswith(stem):
            kind = np.uint8 if tensor.data_type == onnx.TensorProto.UINT8 else np.float16
            offset, shape = int(where["offset"]), tuple(tensor.dims)
            found[kind] = np.memmap(artifact.weights[1], kind, "r+", offset=offset, shape=shape)
    rows = 64 if query else None  # the query's rows come first in the fused matrix
    return found[np.uint8][:rows], found[np.float16][:rows]


@pytest.mark.parametrize(("target", "type", "parts"), [("gguf", "Q4_0", gguf_parts), ("onnx", "int4", onnx_parts)])
@pytest.mark.parametrize("damage", [swap_nibbles, shift_scales, unpermute])
def test_the_forward_oracle_sees_damage(
    tmp_path: Path, target: str, type: str, parts: Callable[[Artifact, bool], Parts], damage: Callable[..., None]
) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        artifact = made_of(model, tmp_path / "artifact", target, type).artifact
        before = kl(model, artifact)
        codes, scales = parts(artifact, damage is unpermute)
        damage(codes, scales)
        del codes, scales
        assert kl(model, artifact) > 1.5 * before


def test_only_one_layer_is_in_memory(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        stream = LayerStream(model)
        with stream.layer(0) as layer:
            assert all(parameter.device.type == "cpu" for parameter in layer.module.parameters())
        assert all(parameter.device.type == "meta" for parameter in layer.module.parameters())
        assert stream.head().shape == (VOCAB, 64)
