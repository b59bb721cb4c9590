"""The peak memory of onnxruntime-genai in a Python process.

The sizes of prepacked matrices are those of ONNX Runtime's library MLAS (`qnbitgemm.cpp`). Only the overhead
(`fitted.toml`) was fitted.
"""

import re
from collections.abc import Collection, Iterable

from exporter.formats.group import Decision
from exporter.predict.peak_memory import ModelShape, Overhead, Peak, SizedModel, Weights
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat

# Prompt tokens processed at once. The chunk is small because of its logits, one row per token.
CHUNK = 128
OVERHEAD = Overhead.fitted("exporter.targets.onnx")
FORMAT = re.compile(r"int(\d)")


def held_weights(decisions: Iterable[Decision], rest_bytes: int) -> Weights:
    """Return the memory of the weights of a decoder with `MatMulNBits`.

    ONNX Runtime prepacks every matrix: codes, and for each block a float32 scale and the float32 sum of its scaled
    codes. An embedding that is looked up is also kept as stored, with its scales widened. Float matrices are packed
    too.

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


def process_peak(shape: ModelShape, weights: Weights, context: int) -> Peak:
    """Return the memory of the process with float32 keys and values, and logits for a whole chunk.

    The logits exist twice: the last, shorter chunk of a prompt gets new logits before the old ones are freed.
    """
    batch = min(context, CHUNK)
    logits = 2 * 4 * shape.vocab * batch
    buffers = int(batch * shape.token_bytes(OVERHEAD)) + logits
    return Peak(OVERHEAD.of_vocabulary(shape.vocab), weights, shape.cache_bytes(context, 4), buffers)


class OnnxRuntimeMemory:
    """ONNX Runtime with a file of which only the size is known; see `exporter.targets.memory.Memory`."""

    def holds(self, format: str) -> bool:
        """Return whether a format is one of integers: `int4`, `int8-b32`."""
        return FORMAT.match(format) is not None

    def peak(self, shape: ModelShape, model: SizedModel, context: int, features: Collection[str]) -> Peak:
        """Return the memory of the process with a model of a shape, in blocks of 32."""
        named = FORMAT.match(model.format)
        assert named is not None
        bits, file_bytes, looked_up = int(named[1]), model.file_bytes, model.looked_up(shape)
        # Float16 scales in the file, float32 scales and sums once packed.
        packed, kept = (file_bytes * (bits + added) / (bits + 0.5) for added in (2, 1))
        resident = packed + looked_up * kept
        return process_peak(shape, Weights(int(resident), int(resident + looked_up * file_bytes)), context)


MEMORY = OnnxRuntimeMemory()
