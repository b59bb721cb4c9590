"""The peak memory of llama.cpp in a Python process.

llama.cpp prints its buffers when it loads a model (`load_tensors`, `llama_kv_cache`); ggml's `ggml-cpu/repack.cpp`
determines which matrices it keeps in a second, repacked form. Only the overhead (`fitted.toml`) was fitted.
"""

import re
from collections.abc import Collection, Iterable

from exporter.formats.group import Decision
from exporter.predict.peak_memory import ModelShape, Overhead, Peak, SizedModel, Weights
from exporter.targets.gguf.session import BATCH

# The cells of the cache are rounded up to a multiple of this.
CACHE_CELLS = 256
OVERHEAD = Overhead.fitted("exporter.targets.gguf")


def held_weights(decisions: Iterable[Decision], file_bytes: int, features: Collection[str]) -> Weights:
    """Return the memory of the weights of a GGUF file and its adapter.

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


def process_peak(shape: ModelShape, weights: Weights, context: int) -> Peak:
    """Return the memory of the process with float16 keys and values, flash attention, last-token logits."""
    cells = -(-context // CACHE_CELLS) * CACHE_CELLS
    batch = min(context, BATCH)
    mask = 2 * batch * cells
    buffers = int(batch * shape.token_bytes(OVERHEAD)) + mask + 4 * shape.vocab
    return Peak(OVERHEAD.of_vocabulary(shape.vocab), weights, shape.cache_bytes(cells, 2), buffers)


class LlamaCppMemory:
    """llama.cpp with a file of which only the size is known; see `exporter.targets.memory.Memory`."""

    def holds(self, format: str) -> bool:
        """Return True: weights in formats of no other runtime are taken for those of GGUF files."""
        return True

    def peak(self, shape: ModelShape, model: SizedModel, context: int, features: Collection[str]) -> Peak:
        """Return the memory of the process with a model of a shape."""
        file_bytes, looked_up = model.file_bytes, model.looked_up(shape)
        type = re.sub("_[SML]$", "", model.format)
        copied = 0.0 if repacked_rows(type, features) is None else (1 - looked_up) * file_bytes
        # A mix has matrices that are not repacked up to the end of its file, so all of it stays mapped.
        mapped = looked_up * file_bytes if copied and type == model.format else file_bytes
        return process_peak(shape, Weights(int(mapped + copied), int(file_bytes + copied)), context)


MEMORY = LlamaCppMemory()
