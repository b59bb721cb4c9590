"""The memory of runtimes: formulas against counts by hand, and against both runtimes with small models."""

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.compress.compression import Compression
from exporter.formats.format import WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.predict.memory_from_size import Interval, alike, predicted_peak
from exporter.predict.peak_memory import ModelShape, Peak, SizedModel, Weights, host_features
from exporter.targets.contract import load_target, lower
from exporter.targets.gguf import memory as llama_cpp
from exporter.targets.gguf.formats.ggml import ggml_format
from exporter.targets.memory import memory_of
from exporter.targets.onnx import memory as onnxruntime
from exporter.targets.onnx.matmulnbits import matmulnbits_format
from exporter.targets.opened import OpenedArtifact
from tests.models import VOCAB, tiny_model

MIB = 1 << 20
SMALL = ModelShape(attention_layers=3, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocab=320)


def decision(format: WeightFormat, rows: int = 64, columns: int = 256, *uses: str) -> Decision:
    return Decision(WeightGroup("w", "q", 0, rows, columns, uses or ("q",), "s"), "rtn", format, "")


def peak_of(
    file_bytes: int, parameters: float, format: str, context: int, features: set[str] | None = None
) -> Interval:
    memory = memory_of("", format)
    assert memory is not None
    return predicted_peak(memory, SizedModel(file_bytes, parameters, format), context, features)


def test_the_cache_holds_a_key_and_a_value_of_each_layer_head_and_token() -> None:
    values = 0
    for _token in range(300):
        for _layer in range(SMALL.attention_layers):
            for _head in range(SMALL.kv_heads):
                values += 2 * SMALL.head_dim
    nothing = Weights(0, 0)
    assert onnxruntime.process_peak(SMALL, nothing, 300).cache_bytes == 4 * values
    # llama.cpp has cells in multiples of 256, in float16.
    assert llama_cpp.process_peak(SMALL, nothing, 300).cache_bytes == 2 * values * 512 // 300


def test_buffers_grow_up_to_the_tokens_that_are_taken_at_once() -> None:
    nothing = Weights(0, 0)
    for peak, batch in ((llama_cpp.process_peak, llama_cpp.BATCH), (onnxruntime.process_peak, onnxruntime.CHUNK)):
        sizes = [peak(SMALL, nothing, context).buffer_bytes for context in (batch // 2, batch, 2 * batch)]
        assert sizes[0] < sizes[1]
        # What still grows is llama.cpp's mask, 2 bytes for each pair of a token and a cell.
        assert sizes[2] - sizes[1] == (2 * batch * batch if peak is llama_cpp.process_peak else 0)


def test_the_peak_is_the_larger_of_loading_and_running() -> None:
    assert Peak(10, Weights(5, 100), 20, 30).bytes == 110
    assert Peak(10, Weights(60, 100), 20, 30).bytes == 120


def test_ggml_repacks_what_the_processor_has_kernels_for() -> None:
    x86, arm = {"avx2"}, {"neon", "dotprod"}
    assert [llama_cpp.repacked_rows("Q4_0", one) for one in (x86, arm, {"neon"}, set[str]())] == [8, 4, None, None]
    assert [llama_cpp.repacked_rows("Q8_0", one) for one in (x86, arm)] == [None, 4]
    assert [llama_cpp.repacked_rows("Q2_K", one) for one in (x86, x86 | {"avx512"})] == [None, 8]
    assert [llama_cpp.repacked_rows("Q6_K", one) for one in (x86, arm)] == [None, 8]
    assert llama_cpp.repacked_rows("IQ4_NL", {"neon"}) == 4


def test_llama_cpp_holds_the_mapped_file_and_repacked_copies() -> None:
    q4, q8 = ggml_format("Q4_0"), ggml_format("Q8_0")
    embedding, first, last = decision(q8, 320, 256, "embedding", "head"), decision(q4), decision(q4, 60)
    plain, packed = embedding.stored_bytes, first.stored_bytes
    file_bytes, rest = plain + packed + last.stored_bytes + 1000, 1000
    # 60 rows are no multiple of 8: that matrix is multiplied from the file, which stays mapped up to it.
    held = llama_cpp.held_weights([embedding, first, last], file_bytes, {"avx2"})
    assert held == Weights(file_bytes + packed, file_bytes + packed)
    # Nothing after the embedding is needed once it is repacked.
    held = llama_cpp.held_weights([embedding, first], file_bytes - last.stored_bytes, {"avx2"})
    assert held == Weights(plain + rest + packed, file_bytes - last.stored_bytes + packed)
    assert llama_cpp.held_weights([embedding, first, last], file_bytes, ()) == Weights(file_bytes, file_bytes)


def test_onnx_runtime_holds_packed_matrices_and_the_embedding_as_it_is() -> None:
    int4 = matmulnbits_format("int4-b32")
    size, blocks = 64 * 256, 64 * 256 // 32
    packed = size // 2 + 8 * blocks
    assert onnxruntime.held_weights([decision(int4)], 10) == Weights(10 + packed, 10 + packed + size // 2)
    tied = onnxruntime.held_weights([decision(int4, 64, 256, "embedding", "head")], 0)
    assert tied.resident_bytes == packed + size // 2 + 4 * blocks
    alone = onnxruntime.held_weights([decision(int4, 64, 256, "embedding")], 0)
    assert alone.resident_bytes == size // 2 + 4 * blocks
    floats = onnxruntime.held_weights([decision(ggml_format("F32"))], 0)
    assert floats.resident_bytes == 4 * size


@pytest.mark.parametrize(("target", "type"), [("gguf", "Q8_0"), ("onnx", "int4")])
def test_small_models_take_what_is_predicted(tmp_path: Path, target: str, type: str) -> None:
    """A model of no size: what is left is the process, the file's pages, and the cache of a large context."""
    with open_model(str(tiny_model(tmp_path / "model", layers=2))) as model:
        made = load_target(target)
        decisions = made.decide(model, type, "rtn")
        (tmp_path / "made").mkdir()
        artifact = lower(made, Compression(model, decisions), type, tmp_path / "made").artifact
        peak = made.estimated_peak(model, decisions, 1024)
    assert peak.cache_bytes == 2 * 1024 * 2 * 2 * 16 * (2 if target == "gguf" else 4)
    prompt = np.random.default_rng(0).integers(2, VOCAB - 20, 990).tolist()
    with OpenedArtifact(artifact, 1024, 1) as child:
        timing = child.measure(prompt, 4, 1)
    overhead = llama_cpp.OVERHEAD if target == "gguf" else onnxruntime.OVERHEAD
    assert peak.process_bytes >= overhead.process_bytes
    # The child imports what started the tests besides; the pages of libraries differ by some 25 MB from run to run.
    assert abs(timing.peak_bytes - peak.bytes) < 40 * MIB
    if target == "onnx":
        settings = json.loads((artifact.folder / "genai_config.json").read_text("utf-8"))
        assert settings["search"]["chunk_size"] == onnxruntime.CHUNK


def test_prompts_in_chunks_end_in_the_same_text(tmp_path: Path) -> None:
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        made = load_target("onnx")
        (tmp_path / "made").mkdir()
        artifact = lower(made, Compression(model, made.decide(model, "F32", "rtn")), "F32", tmp_path / "made").artifact
    prompt = np.random.default_rng(0).integers(2, VOCAB - 20, 300).tolist()
    with OpenedArtifact(artifact, 400, 1) as child:
        last = child.logits(prompt, len(prompt) - 1)
        made_in_chunks = child.generate(prompt, 1)
    assert made_in_chunks == [int(last[-1].argmax())] or int(last[-1].argmax()) == 1


def test_a_peak_is_predicted_without_a_model() -> None:
    found = peak_of(91_900_000, 134.5e6, "Q4_0", 512, {"avx2"})
    assert found.low < found.value < found.high
    # Measured with the demo on x86: 213 MiB.
    assert found.low < 213 * MIB < found.high
    assert abs(found.value / (213 * MIB) - 1) < 0.1
    found = peak_of(78_141_654, 134.5e6, "int4", 512)
    assert abs(found.value / (301 * MIB) - 1) < 0.1
    for format in ("Q4_0", "Q4_K_M", "Q6_K", "int8"):
        assert peak_of(10**9, 1e9, format, 1 << 17).value > peak_of(10**9, 1e9, format, 512).value
    assert len(alike(1.3e9)) > 1
    assert len(alike(1e13)) == 1
    assert host_features() <= {"avx2", "avx512", "avx-vnni", "neon", "dotprod", "i8mm"}


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match="memory of such a model cannot be predicted; got 0 bytes"):
        peak_of(0, 1e9, "Q4_0", 512)
