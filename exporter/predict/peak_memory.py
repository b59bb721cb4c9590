"""How much memory a runtime's process takes at most: its own code, weights, keys and values, and buffers.

What is counted is the process's largest resident set, mapped files included, as `exporter.targets.runtime` measures it.
The terms follow from what the runtimes do: llama.cpp prints its buffers when it loads a model (`load_tensors`,
`llama_kv_cache`), and which matrices it keeps in a second, repacked form stands in ggml's `ggml-cpu/repack.cpp`; ONNX
Runtime's sizes of prepacked matrices are those of its library MLAS (`qnbitgemm.cpp`). Only what the runtimes do not
say was fitted, to artifacts of three shapes with random weights on x86-64 Linux: the `*_BYTES` and `FLOATS` below.
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
# Tokens of a prompt that the runtimes take at once: llama.cpp's physical batch, and onnxruntime-genai's chunk, which
# keeps its logits, one row for each token, small.
LLAMA_CPP_BATCH, ONNX_CHUNK = 512, 128
# Cells of llama.cpp's cache come in multiples of this.
CACHE_CELLS = 256


@dataclass(frozen=True)
class Overhead:
    """What a runtime takes besides what is counted.

    Attributes:
        process_bytes: Python, NumPy and the runtime's libraries, with what a loaded model of no size adds.
        token_bytes: For each token of the vocabulary.
        residual_floats: Buffers of a prompt's token: float32 numbers for each number of the residual stream,
        projected_floats: for each of its queries, keys and values,
        intermediate_floats: and for each channel of the feed-forward part.
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
    """What of a decoder the memory depends on; see `exporter.model.architecture.Architecture`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def cache_bytes(self, tokens: int, bytes_a_value: int) -> int:
        """Return the size of keys and values of so many tokens."""
        return 2 * bytes_a_value * tokens * self.layers * self.kv_heads * self.head_dim

    def token_bytes(self, overhead: Overhead) -> float:
        """Return the buffers of one token of a prompt."""
        projected = (self.heads + 2 * self.kv_heads) * self.head_dim
        return 4 * (
            overhead.residual_floats * self.hidden
            + overhead.projected_floats * projected
            + overhead.intermediate_floats * self.intermediate
        )


@dataclass(frozen=True)
class Weights:
    """What a runtime holds of a model's file, in bytes.

    Attributes:
        resident_bytes: Once it is loaded: pages of the mapped file, and copies in the form that kernels want.
        loading_bytes: The most while it is being loaded.
    """

    resident_bytes: int
    loading_bytes: int


@dataclass(frozen=True)
class Peak:
    """The memory of a runtime's process, in bytes, by what takes it.

    Attributes:
        process_bytes: Interpreter, libraries, vocabulary.
        weights: The model.
        cache_bytes: Keys and values of the whole context: both runtimes allocate it at the start.
        buffer_bytes: Activations and logits of as many of a prompt's tokens as are taken at once.
    """

    process_bytes: int
    weights: Weights
    cache_bytes: int
    buffer_bytes: int

    @property
    def bytes(self) -> int:
        """The most at any time: while it loads, or while it reads a prompt."""
        running = self.weights.resident_bytes + self.cache_bytes + self.buffer_bytes
        return self.process_bytes + max(self.weights.loading_bytes, running)


def llama_cpp_weights(decisions: Iterable[Decision], file_bytes: int, features: Collection[str]) -> Weights:
    """Return what llama.cpp holds of a GGUF file and its adapter.

    The whole file is mapped while matrices are repacked from it; then it lets go of what follows the last that is not.

    Args:
        decisions: In the order of the file.
        file_bytes: Size of the files.
        features: The processor's, as in device profiles.
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
    """Return of what number the rows must be a multiple for ggml to repack a type on a processor; None where never."""
    if "avx2" in features:
        types = {"Q4_0": 8, "Q4_K": 8, "IQ4_NL": 8} | ({"Q2_K": 8} if "avx512" in features else {})
    elif "dotprod" in features or "i8mm" in features:
        types = {"Q4_0": 4, "Q8_0": 4, "IQ4_NL": 4, "Q4_K": 8, "Q5_K": 8, "Q6_K": 8}
    else:
        types = {"IQ4_NL": 4} if "neon" in features else {}
    return types.get(format)


def onnx_weights(decisions: Iterable[Decision], rest_bytes: int) -> Weights:
    """Return what ONNX Runtime holds of a decoder with `MatMulNBits`.

    It prepacks every matrix: codes, and for each block its scale and the sum of its codes times it, in float32. An
    embedding that is looked up is kept as it is stored beside that, its scales widened. Matrices of floats are packed
    too.

    Args:
        decisions: One for each matrix.
        rest_bytes: Size of all else in the file.
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
    """Return the memory of llama.cpp in Python: float16 keys and values, flash attention, the last token's logits."""
    cells = -(-context // CACHE_CELLS) * CACHE_CELLS
    batch = min(context, LLAMA_CPP_BATCH)
    mask = 2 * batch * cells
    buffers = int(batch * shape.token_bytes(LLAMA_CPP)) + mask + 4 * shape.vocab
    process = LLAMA_CPP.process_bytes + LLAMA_CPP.token_bytes * shape.vocab
    return Peak(process, weights, shape.cache_bytes(cells, 2), buffers)


def onnxruntime_peak(shape: ModelShape, weights: Weights, context: int) -> Peak:
    """Return the memory of onnxruntime-genai in Python: float32 keys and values, and logits of each token of a chunk.

    The logits are there twice: the last chunk of a prompt is shorter, and gets its own before the others' are freed.
    """
    batch = min(context, ONNX_CHUNK)
    logits = 2 * 4 * shape.vocab * batch
    buffers = int(batch * shape.token_bytes(ONNXRUNTIME)) + logits
    process = ONNXRUNTIME.process_bytes + ONNXRUNTIME.token_bytes * shape.vocab
    return Peak(process, weights, shape.cache_bytes(context, 4), buffers)


def host_features() -> frozenset[str]:
    """Return of this machine's instruction set what decides about kernels, named as in device profiles."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"neon", "dotprod"})
    path = Path("/proc/cpuinfo")
    words = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
    return features_named(words) & {"avx2", "avx512", "avx-vnni", "neon", "dotprod", "i8mm"}
