"""The grid that quantised weights lie on: the distance between neighbouring values, in ggml's types.

Layouts are those of `gguf.quants`, which decodes the same types.
"""

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import Q4_K


def _float16(blocks: np.ndarray, first: int) -> np.ndarray:
    """Return the float16 at some byte of each block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _of_block(blocks: np.ndarray) -> np.ndarray:
    return _float16(blocks, 0)


def _of_q4_k(blocks: np.ndarray) -> np.ndarray:
    """A block's scale times the six bits of each part of 32 weights."""
    scales, _ = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4 : 4 + Q4_K.K_SCALE_SIZE]))
    return _float16(blocks, 0) * scales.astype(np.float32)


def _of_q6_k(blocks: np.ndarray) -> np.ndarray:
    """A block's scale, which it ends with, times the eight bits of each part of 16 weights."""
    scales = np.ascontiguousarray(blocks[:, -18:-2]).view(np.int8)
    return _float16(blocks, blocks.shape[1] - 2) * scales.astype(np.float32)


# Type -> the steps of a block's parts, which are equally long.
STEPS: dict[Type, Callable[[np.ndarray], np.ndarray]] = {
    Type.Q4_0: _of_block,
    Type.Q4_1: _of_block,
    Type.Q5_0: _of_block,
    Type.Q5_1: _of_block,
    Type.Q8_0: _of_block,
    Type.Q4_K: _of_q4_k,
    Type.Q6_K: _of_q6_k,
}


def grid_steps(codes: np.ndarray, kind: Type) -> np.ndarray:
    """Return the step of each weight of a matrix, float32 [rows, columns].

    Steps may be negative: a block may count from its largest value down.

    Args:
        codes: The encoded rows, uint8 [rows, bytes].
        kind: Their type.

    Raises:
        KeyError: the type is not one of `STEPS`.
    """
    width, size = gguf.GGML_QUANT_SIZES[kind]
    parts = STEPS[kind](codes.reshape(-1, size))
    return np.repeat(parts, width // parts.shape[1], axis=1).reshape(len(codes), -1)
