"""ONNX Runtime's `MatMulNBits` formats: 2, 4 or 8 bits, blocks of 16 to 256 columns, symmetric or not.

A weight is (code - zero point) x scale, the scale being float32. An encoded row holds the codes of all blocks, then
their scales, then their zero points; `split` gives the three initialisers that the operator takes.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import RequestError, did_you_mean
from exporter.weights.format import Bytes, Float32

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
SCALE_BYTES = 4
NAME = re.compile(r"int(\d)-b(\d+)(-asymmetric)?")
# Shares of the full range tried as the range of a block: clipping its tails often costs less than coarse steps.
CLIPPINGS = np.linspace(1.0, 0.7, 5, dtype=np.float32)
VALUES_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class _IntegerGrid:
    """Codes of one block: scales and zero points, float32 [rows]."""

    bits: int
    asymmetric: bool
    scale: Float32
    zero_point: Float32

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return the nearest codes, uint8 [rows], and what they decode to, float32 [rows]."""
        codes = np.rint(values / self.scale) + self.zero_point
        codes = np.clip(codes, 0, (1 << self.bits) - 1)
        return codes.astype(np.uint8), (codes - self.zero_point) * self.scale

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block: packed codes, the scale's bytes, the zero point where there is one."""
        scale = np.ascontiguousarray(self.scale, np.float32)[:, None].view(np.uint8)
        parts = [_pack_bits(codes, self.bits), scale]
        if self.asymmetric:
            parts.append(self.zero_point.astype(np.uint8)[:, None])
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class MatMulNBitsFormat:
    """Integers of a few bits with a scale, and where asymmetric a zero point, for each block of columns."""

    bits: int
    block_columns: int
    asymmetric: bool = False
    needs_importance: bool = False

    @property
    def name(self) -> str:
        """Such as `int4-b32` or `int4-b32-asymmetric`."""
        return f"int{self.bits}-b{self.block_columns}{'-asymmetric' if self.asymmetric else ''}"

    def fits(self, columns: int) -> bool:
        """Return whether a row of so many weights is a whole number of blocks."""
        return columns % self.block_columns == 0

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of codes, scales and zero points."""
        return rows * sum(self._parts(columns))

    def _parts(self, columns: int) -> tuple[int, int, int]:
        """Return the bytes of a row's codes, scales and zero points."""
        blocks = columns // self.block_columns
        zero_points = -(-blocks * self.bits // 8) if self.asymmetric else 0
        return columns * self.bits // 8, blocks * SCALE_BYTES, zero_points

    def encode_rows(self, weight: Float32, importance: Float32 | None) -> Bytes:
        """Encode whole rows, every weight to its nearest code.

        Raises:
            RequestError: the rows are not a whole number of blocks.
        """
        rows, columns = weight.shape
        if not self.fits(columns):
            raise RequestError(
                f"{self.name} cannot hold rows of {columns} weights", expected=f"a multiple of {self.block_columns}"
            )
        step = max(1, VALUES_AT_ONCE // columns)
        return np.concatenate([self._encode(weight[at : at + step], importance) for at in range(0, rows, step)])

    def _encode(self, weight: Float32, importance: Float32 | None) -> Bytes:
        rows, columns = weight.shape
        blocks = weight.reshape(-1, self.block_columns)
        weights = np.ones(columns, np.float32) if importance is None else importance
        repeated = np.tile(weights.reshape(-1, self.block_columns), (rows, 1))
        grid = self._best_grid(blocks, repeated)
        codes, _ = _round_all(grid, blocks)
        packed = grid.pack(codes).reshape(rows, columns // self.block_columns, -1)
        return self.join([packed[:, i] for i in range(packed.shape[1])])

    def grid(self, block: Float32, importance: Float32 | None) -> _IntegerGrid:
        """Fix scale and zero point of one block for every row: those of the least weighted squared error."""
        weights = np.ones(block.shape[1], np.float32) if importance is None else importance
        return self._best_grid(block, np.broadcast_to(weights, block.shape))

    def _best_grid(self, blocks: Float32, weights: Float32) -> _IntegerGrid:
        """Try clipped ranges, refit the scale to the codes by least squares, keep the best of each row."""
        candidates = [self._fitted(blocks, weights, share) for share in (CLIPPINGS if self.bits < 8 else CLIPPINGS[:1])]
        errors = np.stack([_error(grid, blocks, weights) for grid in candidates])
        best = errors.argmin(axis=0)
        rows = np.arange(len(blocks))
        scale = np.stack([grid.scale for grid in candidates])[best, rows]
        zero_point = np.stack([grid.zero_point for grid in candidates])[best, rows]
        return _IntegerGrid(self.bits, self.asymmetric, scale, zero_point)

    def _fitted(self, blocks: Float32, weights: Float32, share: np.float32) -> _IntegerGrid:
        grid = self._ranged(blocks, share)
        if self.bits == 8:
            return grid
        codes, _ = _round_all(grid, blocks)
        steps = codes - grid.zero_point[:, None]
        norm = np.einsum("ij,ij,ij->i", weights, steps, steps)
        fit = np.einsum("ij,ij,ij->i", weights, steps, blocks)
        scale = np.where((norm > 0) & (fit > 0) if self.asymmetric else norm > 0, fit / np.where(norm > 0, norm, 1), 0)
        return _IntegerGrid(
            self.bits, self.asymmetric, _usable(np.where(scale == 0, grid.scale, scale)), grid.zero_point
        )

    def _ranged(self, blocks: Float32, share: np.float32) -> _IntegerGrid:
        """Return the grid whose range is a share of the blocks' own."""
        codes = (1 << self.bits) - 1
        if self.asymmetric:
            low, high = np.minimum(blocks.min(axis=1), 0) * share, np.maximum(blocks.max(axis=1), 0) * share
            scale = _usable((high - low) / codes)
            zero_point = np.clip(np.rint(-low / scale), 0, codes)
        else:
            middle = 1 << (self.bits - 1)
            # The side with one more code gets the largest value: its sign decides the sign of the scale.
            largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
            scale = _usable(largest * share / -middle)
            zero_point = np.full(len(blocks), middle, np.float32)
        return _IntegerGrid(self.bits, self.asymmetric, scale, zero_point.astype(np.float32))

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks: all codes, all scales, all zero points."""
        stacked = np.stack(blocks, axis=1)
        rows = len(stacked)
        codes = self.block_columns * self.bits // 8
        parts = [stacked[:, :, :codes], stacked[:, :, codes : codes + SCALE_BYTES]]
        joined = [part.reshape(rows, -1) for part in parts]
        if self.asymmetric:
            joined.append(_pack_bits(stacked[:, :, codes + SCALE_BYTES], self.bits))
        return np.concatenate(joined, axis=1)

    def split(self, data: Bytes, columns: int) -> tuple[Bytes, Float32, Bytes | None]:
        """Return codes uint8 [rows, blocks, bytes], scales float32 [rows, blocks], zero points uint8 [rows, bytes]."""
        codes, scales, _ = self._parts(columns)
        blocks = columns // self.block_columns
        packed = np.ascontiguousarray(data[:, :codes]).reshape(len(data), blocks, -1)
        scale = np.ascontiguousarray(data[:, codes : codes + scales]).view(np.float32)
        return packed, scale, np.ascontiguousarray(data[:, codes + scales :]) if self.asymmetric else None

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Return what `MatMulNBits` multiplies with at accuracy level 0, float32 [rows, columns]."""
        packed, scale, zero_points = self.split(data, columns)
        rows, blocks = scale.shape
        codes = _unpack_bits(packed.reshape(rows, -1), self.bits).reshape(rows, blocks, self.block_columns)
        middle = np.float32(1 << (self.bits - 1))
        zero = (
            middle if zero_points is None else _unpack_bits(zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        )
        return ((codes.astype(np.float32) - zero) * scale[:, :, None]).reshape(rows, columns)


def _usable(scale: NDArray[np.floating[Any]]) -> Float32:
    """Replace scales that are zero or so small that a weight over them overflows."""
    return np.where(np.abs(scale) < 1e-30, np.float32(1.0), scale).astype(np.float32)


def _round_all(grid: _IntegerGrid, blocks: Float32) -> tuple[Bytes, Float32]:
    wide = _IntegerGrid(grid.bits, grid.asymmetric, grid.scale[:, None], grid.zero_point[:, None])
    return wide.round(0, blocks)


def _error(grid: _IntegerGrid, blocks: Float32, weights: Float32) -> Float32:
    difference = _round_all(grid, blocks)[1] - blocks
    error: Float32 = np.einsum("ij,ij,ij->i", weights, difference, difference)
    return error


def _pack_bits(codes: Bytes, bits: int) -> Bytes:
    """Pack codes, uint8 [rows, n], low bits first, into bytes [rows, ceil(n bits / 8)]."""
    per_byte = 8 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_byte))).reshape(len(codes), -1, per_byte)
    packed = np.zeros(padded.shape[:2], np.uint8)
    for i in range(per_byte):
        packed |= padded[:, :, i] << np.uint8(i * bits)
    return packed


def _unpack_bits(packed: Bytes, bits: int) -> Bytes:
    """Undo `_pack_bits`, padding included."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def matmulnbits_formats() -> dict[str, MatMulNBitsFormat]:
    """Return every `MatMulNBits` format by name."""
    made = (MatMulNBitsFormat(bits, block, odd) for bits in BITS for block in BLOCKS for odd in (False, True))
    return {format.name: format for format in made}


def matmulnbits_format(name: str) -> MatMulNBitsFormat:
    """Return the format of that name.

    Raises:
        RequestError: there is no such format.
    """
    formats = matmulnbits_formats()
    if name not in formats:
        raise RequestError(f"unknown MatMulNBits format {name!r}", next_step=did_you_mean(name, formats))
    return formats[name]
