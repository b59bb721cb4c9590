"""The code layouts of ggml's types, so that error feedback can choose the codes.

The tests prove each layout against ggml's own decoder. For the K types, ggml-common.h of
https://github.com/ggml-org/llama.cpp describes the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from exporter.formats.format import Bytes, Float32


@dataclass(frozen=True)
class Layout:
    """How a block is composed of scales and codes; a weight is `levels[code]` times a scale, plus a minimum.

    Attributes:
        levels: Unscaled value of each code, ascending whole numbers, float32 [codes].
        columns: Weights of a block that share scale and minimum.
        put: Writes codes, uint8 [rows, block columns], into encoded blocks, uint8 [rows, bytes of a block].
        scales: Number of float16 values at the block's beginning, if they alone scale its weights: 1 for a scale, 2
            for a scale and a minimum; 0 if scales are nested; see `exporter.targets.gguf.formats.k_quants`.
    """

    levels: Float32
    columns: int
    put: Callable[[Bytes, Bytes], None]
    scales: int = 0


def _halves(codes: Bytes) -> Bytes:
    """Low nibbles hold the first half of the columns, high nibbles the second."""
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << np.uint8(4))


def _nibbles(first_byte: int) -> Callable[[Bytes, Bytes], None]:
    def put(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, first_byte:] = _halves(codes)

    return put


def _nibbles_and_fifth_bits(first_byte: int) -> Callable[[Bytes, Bytes], None]:
    """The fifth bits of all 32 codes as one little-endian word, then the nibbles (`block_q5_0`)."""

    def put(blocks: Bytes, codes: Bytes) -> None:
        blocks[:, first_byte : first_byte + 4] = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
        blocks[:, first_byte + 4 :] = _halves(codes & np.uint8(15))

    return put


def _signed_bytes(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 2:] = codes - np.uint8(128)


def _by_64(codes: Bytes) -> Bytes:
    """Of each 64 columns, the low nibbles hold the first 32, the high ones the others (`block_q4_K`)."""
    parts = codes.reshape(len(codes), 4, 2, 32)
    return (parts[:, :, 0] | (parts[:, :, 1] << np.uint8(4))).reshape(len(codes), 128)


def _put_q4_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:] = _by_64(codes)


def _put_q5_k(blocks: Bytes, codes: Bytes) -> None:
    """Bit i of byte l is the fifth bit of column 32 i + l; then nibbles as in `block_q4_K`."""
    fifth = (codes >> np.uint8(4)).reshape(len(codes), 8, 32)
    blocks[:, 16:48] = np.packbits(fifth, axis=1, bitorder="little")[:, 0]
    blocks[:, 48:] = _by_64(codes & np.uint8(15))


def _put_q6_k(blocks: Bytes, codes: Bytes) -> None:
    """Of each 128 columns: two rows of 32 low nibbles, two of high ones; then two high bits of all four a byte."""
    parts = codes.reshape(len(codes), 2, 4, 32)
    low, high = parts & np.uint8(15), parts >> np.uint8(4)
    blocks[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << np.uint8(4))).reshape(len(codes), 128)
    blocks[:, 128:192] = _two_bits(high).reshape(len(codes), 64)


def _two_bits(parts: Bytes) -> Bytes:
    """Pack [..., 4, n] codes of two bits into [..., n] bytes, the first in the lowest bits."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(parts << shifts, axis=-2)
    return packed


def _put_q3_k(blocks: Bytes, codes: Bytes) -> None:
    """Third bits: bit i of byte l is that of column 32 i + l; then two bits of four columns a byte."""
    blocks[:, :32] = np.packbits((codes >> np.uint8(2)).reshape(len(codes), 8, 32), axis=1, bitorder="little")[:, 0]
    low = (codes & np.uint8(3)).reshape(len(codes), 2, 4, 32)
    blocks[:, 32:96] = _two_bits(low).reshape(len(codes), 64)


def _put_q2_k(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 16:80] = _two_bits(codes.reshape(len(codes), 2, 4, 32)).reshape(len(codes), 64)


def _put_iq4_xs(blocks: Bytes, codes: Bytes) -> None:
    blocks[:, 8:] = _halves(codes.reshape(-1, 32)).reshape(len(codes), 128)


def _whole(first: int, count: int) -> Float32:
    return np.arange(first, first + count, dtype=np.float32)


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
LAYOUTS = {
    "Q4_0": Layout(_whole(-8, 16), 32, _nibbles(2), 1),
    "Q4_1": Layout(_whole(0, 16), 32, _nibbles(4), 2),
    "Q5_0": Layout(_whole(-16, 32), 32, _nibbles_and_fifth_bits(2), 1),
    "Q5_1": Layout(_whole(0, 32), 32, _nibbles_and_fifth_bits(4), 2),
    "Q8_0": Layout(_whole(-128, 256), 32, _signed_bytes, 1),
    "IQ4_NL": Layout(_IQ4, 32, _nibbles(2), 1),
    "Q2_K": Layout(_whole(0, 4), 16, _put_q2_k),
    "Q3_K": Layout(_whole(-4, 8), 16, _put_q3_k),
    "Q4_K": Layout(_whole(0, 16), 32, _put_q4_k),
    "Q5_K": Layout(_whole(0, 32), 32, _put_q5_k),
    "Q6_K": Layout(_whole(-32, 64), 16, _put_q6_k),
    "IQ4_XS": Layout(_IQ4, 32, _put_iq4_xs),
}
