"""8-bit formats with one step per row, chosen by the encoder so that entropy coding makes the file small.

With coarse steps only a few of the 256 codes occur, and equal scales repeat, so both take few bits in a coded file. The
runtime loads the restored file like any other of its 8-bit files.
"""

import gguf
import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32, WeightFormat
from exporter.formats.ggml import GgmlFormat
from exporter.formats.matmulnbits import MatMulNBitsFormat
from exporter.formats.per_channel import ChannelFormat
from exporter.foundation.errors import RequestError

LARGEST_CODE = 127
_SMALLEST = {np.float16: np.float32(2**-24), np.float32: np.float32(1e-30)}


def scale_type(format: WeightFormat) -> type[np.float16 | np.float32]:
    """Return the type in which a format stores its scales.

    Raises:
        RequestError: it is not a symmetric format of 8 bits.
    """
    if isinstance(format, GgmlFormat) and format.type == gguf.GGMLQuantizationType.Q8_0:
        return np.float16
    if isinstance(format, MatMulNBitsFormat) and format.bits == 8 and not format.asymmetric:
        return format.scale_type
    if isinstance(format, ChannelFormat):
        return np.float32
    raise RequestError(
        "steps can be chosen in symmetric formats of 8 bits only", got=format.name,
        expected="Q8_0, int8-channel, or int8-b16 to int8-b256",
    )  # fmt: skip


def stored_steps(format: WeightFormat, steps: Float32) -> Float32:
    """Return steps, float32 [rows], as a format stores them.

    Raises:
        RequestError: a step exceeds the range of the format's scales.
    """
    stored = scale_type(format)
    if steps.max(initial=0) > np.finfo(stored).max:
        raise RequestError("a step is beyond the scales of the format", where=format.name, got=steps.max())
    return np.maximum(steps, _SMALLEST[stored]).astype(stored).astype(np.float32)


def encode_steps(format: WeightFormat, codes: NDArray[np.int8], steps: Float32) -> Bytes:
    """Return encoded rows, uint8 [rows, bytes of a row].

    Args:
        format: A symmetric format of 8 bits.
        codes: int8 [rows, columns].
        steps: One for each row, as stored, float32 [rows].
    """
    scale = steps.astype(scale_type(format))[:, None].view(np.uint8)
    if isinstance(format, ChannelFormat):
        return np.concatenate([codes.view(np.uint8), scale], axis=1)
    blocks = codes.view(np.uint8).reshape(len(codes), -1, format.block_columns)
    if isinstance(format, MatMulNBitsFormat):
        blocks = blocks + np.uint8(128)
    scales = np.broadcast_to(scale[:, None], (*blocks.shape[:2], scale.shape[1]))
    order = (blocks, scales) if isinstance(format, MatMulNBitsFormat) else (scales, blocks)
    made = np.concatenate(order, axis=2)
    return format.join([np.ascontiguousarray(made[:, block]) for block in range(made.shape[1])])
