"""The weight formats of static integer graphs: int8 or int4, symmetric, one float32 scale per row of the matrix.

A row is an output channel of a matrix multiplication, or a token of the embedding: the form that QNN, XNNPACK and ONNX
Runtime use with integer activations. A weight is code x scale with codes from -127 to 127, or from -7 to 7: without
-128 and -8 the grid is symmetric, as those runtimes require. An encoded row holds its codes, two of 4 bits in a byte
with the first in the lower half, then its scale.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32, fitted_scale, squared_error
from exporter.formats.row_scaled import RowScaling
from exporter.foundation.errors import RequestError

SCALE_BYTES = 4
# A weight divided by a smaller scale may overflow.
LEAST_SCALE = np.float32(1e-30)


@dataclass(frozen=True)
class _ChannelGrid:
    """Codes of whole rows: scales, float32 [rows], and the bits of a code."""

    scale: Float32
    bits: int

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return the nearest codes, the bytes of int8 [rows], and their decoded values, float32 [rows]."""
        largest = largest_code(self.bits)
        codes = np.clip(np.rint(values / self.scale), -largest, largest)
        return codes.astype(np.int8).view(np.uint8), codes * self.scale

    def decode(self, codes: Bytes) -> Float32:
        """Decode codes, the bytes of int8 [columns, rows], to float32 of the same shape."""
        return codes.view(np.int8) * self.scale

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "_ChannelGrid":
        """Return the grid with the best scales for the codes; see `Grid.refit`."""
        levels = codes.view(np.int8).astype(np.float32)
        scale = fitted_scale(levels, gram, aim)
        usable = scale >= LEAST_SCALE
        better = squared_error(levels * scale, gram, aim) < squared_error(levels * self.scale, gram, aim)
        return _ChannelGrid(np.where(usable & better, scale, self.scale), self.bits)

    def pack(self, codes: Bytes) -> Bytes:
        """Return encoded rows: codes, then the scale's bytes."""
        stored = codes if self.bits == 8 else packed(codes.view(np.int8))
        return np.concatenate([stored, np.ascontiguousarray(self.scale)[:, None].view(np.uint8)], axis=1)


def largest_code(bits: int) -> int:
    """Return the largest code of so many bits in a symmetric grid."""
    return (1 << bits - 1) - 1


def packed(codes: NDArray[np.int8]) -> Bytes:
    """Return codes of 4 bits, int8 [rows, columns], two in a byte, uint8 [rows, half the columns rounded up]."""
    even: Bytes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).view(np.uint8) & np.uint8(15)
    halves: Bytes = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    return halves


@dataclass(frozen=True)
class ChannelFormat:
    """int8 or int4 with one scale per row; a format is for rows of one width, since the whole row is its block.

    Attributes:
        block_columns: The width.
        bits: Bits of a code, 8 or 4.
    """

    block_columns: int
    bits: int = 8
    needs_importance: bool = False

    @property
    def name(self) -> str:
        """The name, such as `int8-channel`."""
        return f"int{self.bits}-channel"

    @property
    def activation_block(self) -> int | None:
        """None: the graph, not the runtime, determines how activations are rounded."""
        return None

    def fits(self, columns: int) -> bool:
        """Return whether a row has the format's width."""
        return columns == self.block_columns

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes and scales."""
        return rows * (-(-columns * self.bits // 8) + SCALE_BYTES)

    def encode_rows(self, weight: Float32, importance: Float32 | None) -> Bytes:
        """Encode whole rows, every weight to its nearest code; the importance is ignored.

        Raises:
            RequestError: the rows have another width.
        """
        if not self.fits(weight.shape[1]):
            raise RequestError(
                f"this {self.name} cannot hold rows of {weight.shape[1]} weights", expected=self.block_columns
            )
        grid = self.grid(weight, importance)
        codes, _ = grid.round(0, weight.T)
        return grid.pack(np.ascontiguousarray(codes.T))

    def grid(self, block: Float32, importance: Float32 | None) -> _ChannelGrid:
        """Set the scale of every row so that its largest weight gets the largest code."""
        scale = np.abs(block).max(axis=1) / np.float32(largest_code(self.bits))
        return _ChannelGrid(np.where(scale < LEAST_SCALE, np.float32(1), scale), self.bits)

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their only block."""
        (rows,) = blocks
        return rows

    @property
    def row_scaling(self) -> RowScaling | None:
        """How rows with given scales are stored; None for 4 bits."""
        if self.bits != 8:
            return None
        return RowScaling(np.float32, lambda codes, scales: np.concatenate([codes.view(np.uint8), scales], axis=1))

    def split(self, data: Bytes) -> tuple[NDArray[np.int8], Float32]:
        """Return codes, int8 [rows, columns], and scales, float32 [rows]."""
        stored = np.ascontiguousarray(data[:, :-SCALE_BYTES])
        codes = stored.view(np.int8) if self.bits == 8 else self._unpacked(stored)
        return codes, np.ascontiguousarray(data[:, -SCALE_BYTES:]).view(np.float32)[:, 0]

    def _unpacked(self, stored: Bytes) -> NDArray[np.int8]:
        """Return codes of 4 bits, int8 [rows, columns]."""
        halves = np.stack([stored << 4, stored & 0xF0], axis=2).view(np.int8) >> 4
        return np.ascontiguousarray(halves.reshape(len(stored), -1)[:, : self.block_columns])

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Decode rows as `DequantizeLinear` does, float32 [rows, columns]."""
        codes, scale = self.split(data)
        return codes.astype(np.float32) * scale[:, None]
