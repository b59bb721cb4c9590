"""The peak memory of a runtime's process: its own code, weights, keys and values, and buffers.

This is the largest resident set of the process including mapped files, as measured by `exporter.targets.runtime`. The
terms follow from the runtimes' behaviour. llama.cpp prints its buffers when it loads a model (`load_tensors`,
`llama_kv_cache`); ggml's `ggml-cpu/repack.cpp` determines which matrices it keeps in a second, repacked form. The sizes
of ONNX Runtime's prepacked matrices are those of its library MLAS (`qnbitgemm.cpp`). Only the `Overhead` values below
were fitted, to artifacts of three shapes with random weights on x86-64 Linux.
"""

import platform
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from exporter.device.backend import features_named
from exporter.formats.group import Decision
from exporter.formats.matmulnbits import MatMulNBitsFormat

MIB = 1 << 20
# Prompt tokens processed at once: llama.cpp's physical batch, and onnxruntime-genai's chunk. The chunk is small because
# of its logits, one row per token.
LLAMA_CPP_BATCH, ONNX_CHUNK = 512, 128
# llama.cpp rounds the cells of its cache up to a multiple of this.
CACHE_CELLS = 256


@dataclass(frozen=True)
class Overhead:
    """The fitted memory overhead of a runtime.

    Attributes:
        process_bytes: Python, NumPy, the runtime's libraries, and the fixed cost of a loaded model.
        token_bytes: Bytes per token of the vocabulary.
        residual_floats: Buffers of a prompt token, in float32 numbers per element of the residual stream.
        projected_floats: The same per element of its queries, keys and values.
        intermediate_floats: The same per channel of the feed-forward part.
    """

    process_bytes: int
    token_bytes: int
    residual_floats: float
    projected_floats: float
    intermediate_floats: float


LLAMA_CPP = Overhead(52 * MIB, 350, 6.0, 0.0, 2.6)
ONNXRUNTIME = Overhead(115 * MIB, 0, 14.0, 1.8, 1.5)


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder that determine its memory; see `exporter.model.decoder.Decoder`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def cache_bytes(self, tokens: int, bytes_a_value: int) -> int:
        """Return the size of the keys and values of `tokens` tokens."""
        return 2 * bytes_a_value * tokens * self.layers * self.kv_heads * self.head_dim

    def token_bytes(self, overhead: Overhead) -> float:
        """Return the buffer size of one prompt token."""
        projected = (self.heads + 2 * self.kv_heads) * self.head_dim
        return 4 * (
            overhead.residual_floats * self.hidden
            + overhead.projected_floats * projected
            + overhead.intermediate_floats * self.intermediate
        )


@dataclass(frozen=True)
class Weights:
    """The memory of a model's weights in a runtime, in bytes.

    Attributes:
        resident_bytes: After loading: pages of the mapped file, and repacked copies for the kernels.
        loading_bytes: Peak during loading.
    """

    resident_bytes: int
    loading_bytes: int


@dataclass(frozen=True)
class Peak:
    """The memory of a runtime's process by use, in bytes.

    Attributes:
        process_bytes: Interpreter, libraries, vocabulary.
        weights: The model.
        cache_bytes: Keys and values of the whole context, which both runtimes allocate at the start.
        buffer_bytes: Activations and logits of the prompt tokens processed at once.
    """

    process_bytes: int
    weights: Weights
    cache_bytes: int
    buffer_bytes: int

    @property
    def bytes(self) -> int:
        """The peak, reached either during loading or while processing a prompt."""
        running = self.weights.resident_bytes + self.cache_bytes + self.buffer_bytes
        return self.process_bytes + max(self.weights.loading_bytes, running)


def llama_cpp_weights(decisions: Iterable[Decision], file_bytes: int, features: Collection[str]) -> Weights:
    """Return the memory of the weights of a GGUF file and its adapter in llama.cpp.

    The whole file is mapped while matrices are repacked from it. Then llama.cpp unmaps everything after the last matrix
    that is not repacked.

    Args:
        decisions: Decisions in the order of the file.
        file_bytes: Size of the files.
        features: Features of the processor, as in device profiles.
    """
    repacked = factors = mapped = passed = 0
    for decision in decisions:
        group, base = decision.group, decision.base_bytes
        passed += base
        factors += decision.stored_bytes - base
        rows = repacked_rows(decision.format.name, features)
        again = rows is not None and group.rows % rows == 0
        if again and "embedding" not in group.uses:
            repacked += base
        else:
            repacked += base if again and "head" in group.uses else 0
            mapped = passed
    rest = file_bytes - factors - passed
    return Weights(mapped + rest + repacked + factors, file_bytes + repacked)


def repacked_rows(format: str, features: Collection[str]) -> int | None:
    """Return the number that must divide a matrix's rows for ggml to repack its type; None if it never does."""
    if "avx2" in features:
        types = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8} | ({"Q2_K": 8} if "avx512" in features else {})
    elif "dotprod" in features or "i8mm" in features:
        types = {"Q4_0": 4, "Q8_0": 4, "IQ4_NL": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8}
    else:
        types = {"IQ4_NL": 4} if "neon" in features else {}
    return types.get(format)


def onnx_weights(decisions: Iterable[Decision], rest_bytes: int) -> Weights:
    """Return the memory of the weights of a decoder with `MatMulNBits` in ONNX Runtime.

    It prepacks every matrix: codes, and for each block a float32 scale and the float32 sum of its scaled codes. An
    embedding that is looked up is also kept as stored, with its scales widened. Float matrices are packed too.

    Args:
        decisions: One for each matrix.
        rest_bytes: Size of the rest of the file.
    """
    resident, largest = rest_bytes, 0
    for decision in decisions:
        group, format = decision.group, decision.format
        if isinstance(format, MatMulNBitsFormat):
            codes, blocks = group.size * format.bits // 8, group.size // format.block_columns
            kept, packed = decision.base_bytes + blocks * (4 - format.scale_bytes), codes + 8 * blocks
        else:
            codes = kept = packed = decision.base_bytes
        factors = 2 * (decision.stored_bytes - decision.base_bytes)
        resident += kept * ("embedding" in group.uses) + packed * (group.uses != ("embedding",)) + factors
        largest = max(largest, codes)
    return Weights(resident, resident + largest)


def llama_cpp_peak(shape: ModelShape, weights: Weights, context: int) -> Peak:
    """Return the memory of llama.cpp in Python with float16 keys and values, flash attention, last-token logits."""
    cells = -(-context // CACHE_CELLS) * CACHE_CELLS
    batch = min(context, LLAMA_CPP_BATCH)
    mask = 2 * batch * cells
    buffers = int(batch * shape.token_bytes(LLAMA_CPP)) + mask + 4 * shape.vocab
    process = LLAMA_CPP.process_bytes + LLAMA_CPP.token_bytes * shape.vocab
    return Peak(process, weights, shape.cache_bytes(cells, 2), buffers)


def onnxruntime_peak(shape: ModelShape, weights: Weights, context: int) -> Peak:
    """Return the memory of onnxruntime-genai in Python with float32 keys and values, and logits for a whole chunk.

    The logits exist twice: the last, shorter chunk of a prompt gets new logits before the old ones are freed.
    """
    batch = min(context, ONNX_CHUNK)
    logits = 2 * 4 * shape.vocab * batch
    buffers = int(batch * shape.token_bytes(ONNXRUNTIME)) + logits
    process = ONNXRUNTIME.process_bytes + ONNXRUNTIME.token_bytes * shape.vocab
    return Peak(process, weights, shape.cache_bytes(context, 4), buffers)


def host_features() -> frozenset[str]:
    """Return this machine's features that select kernels, named as in device profiles."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"neon", "dotprod"})
    path = Path("/proc/cpuinfo")
    words = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
    return features_named(words) & {"avx2", "avx512", "avx-vnni", "neon", "dotprod", "i8mm"}
