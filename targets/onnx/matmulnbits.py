"""ONNX Runtime's `MatMulNBits` formats: 2, 4 or 8 bits, blocks of 16 to 256 columns, symmetric or not.

A weight is (code - zero point) x scale. Scales are stored in float16, or in float32 if the name says so; the operator
takes them in float32. An encoded row holds the codes of all blocks, then their scales, then their zero points. `split`
returns the three as the stored initialisers.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32, fitted_line, fitted_scale, squared_error
from exporter.formats.integers import Integers, whole_multiples
from exporter.formats.row_scaled import Int8, RowScaling, in_blocks
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import RequestError, did_you_mean

BITS = (2, 4, 8)
BLOCKS = (16, 32, 64, 128, 256)
FLOAT32_SUFFIX = "-f32"
# Shares of the full range tried as the range of a block: clipping its tails often costs less than coarse steps.
CLIPPINGS = np.linspace(1.0, 0.7, 5, dtype=np.float32)
ROWS_AT_ONCE = 2048
# A float32 weight divided by anything smaller may overflow.
SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class _IntegerGrid:
    """Codes of one block: scales and zero points, float32 [rows]."""

    bits: int
    asymmetric: bool
    scale: Float32
    zero_point: Float32
    stored: type[np.float16 | np.float32]

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return the nearest codes, uint8 [rows], and their decoded values, float32 [rows]."""
        codes = self.nearest(values)
        return codes.astype(np.uint8), self._decoded(codes)

    def nearest(self, values: Float32) -> Float32:
        """Return the nearest codes as whole float32 numbers; values and codes are [..., rows]."""
        codes: Float32 = values / self.scale
        np.rint(codes, out=codes)
        codes += self.zero_point
        np.maximum(codes, 0, out=codes)
        np.minimum(codes, (1 << self.bits) - 1, out=codes)
        return codes

    def decode(self, codes: Bytes) -> Float32:
        """Decode codes, uint8 [..., rows], to float32 of the same shape."""
        return self._decoded(codes.astype(np.float32))

    def _decoded(self, codes: Float32) -> Float32:
        """Decode codes in place."""
        codes -= self.zero_point
        codes *= self.scale
        return codes

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "_IntegerGrid":
        """Return the grid with the best scales, and zero points if it has any, for the codes."""
        zero_point = self.zero_point
        if self.asymmetric:
            scale, minimum = fitted_line(codes.astype(np.float32), gram, aim)
            wanted = np.divide(-minimum, scale, out=zero_point.copy(), where=scale != 0)
            zero_point = np.clip(np.rint(wanted), 0, (1 << self.bits) - 1).astype(np.float32)
        steps = codes - zero_point
        scale = _storable(fitted_scale(steps, gram, aim), self.stored)
        better = squared_error(steps * scale, gram, aim) < squared_error(self.decode(codes), gram, aim)
        return replace(
            self,
            scale=np.where(better, scale, self.scale),
            zero_point=np.where(better, zero_point, self.zero_point),
        )

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block: packed codes, the scale's bytes, the zero point if there is one."""
        scale = np.ascontiguousarray(self.scale, self.stored)[:, None].view(np.uint8)
        parts = [_pack_bits(codes, self.bits), scale]
        if self.asymmetric:
            parts.append(self.zero_point.astype(np.uint8)[:, None])
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class MatMulNBitsFormat:
    """Integers of a few bits with a scale, and if asymmetric a zero point, per block of columns.

    Attributes:
        scale_type: Type of the stored scales. Codes are chosen for the stored scale, so float16 only loses range: its
            largest value is 65504, and below 6e-5 it gets coarser, down to a last step of 6e-8.
    """

    bits: int
    block_columns: int
    asymmetric: bool = False
    scale_type: type[np.float16 | np.float32] = np.float16
    needs_importance: bool = False

    @property
    def name(self) -> str:
        """Such as `int4-b32`, `int4-b32-asymmetric` or, with float32 scales, `int4-b32-f32`."""
        scales = FLOAT32_SUFFIX if self.scale_type is np.float32 else ""
        return f"int{self.bits}-b{self.block_columns}{'-asymmetric' if self.asymmetric else ''}{scales}"

    @property
    def scale_bytes(self) -> int:
        """Bytes of a stored scale."""
        return np.dtype(self.scale_type).itemsize

    @property
    def activation_block(self) -> int | None:
        """Number of inputs that ONNX Runtime rounds to 8 bits with one scale: those of a block."""
        return self.block_columns

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
        return columns * self.bits // 8, blocks * self.scale_bytes, zero_points

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
        encode = partial(self._encode, importance=importance)
        with ThreadPoolExecutor(available_cores()) as pool:
            chunks = (weight[at : at + ROWS_AT_ONCE] for at in range(0, rows, ROWS_AT_ONCE))
            return np.concatenate(list(pool.map(encode, chunks)))

    def holds(self, integers: Integers) -> bool:
        """Return whether blocks have one step, and no more multiples than codes."""
        return Integers(self.bits, self.block_columns).hold(integers)

    def exact_rows(self, weight: Float32) -> Bytes | None:
        """Encode weights that are whole multiples of a step; the zero point, stored or not, is the middle code."""
        found = whole_multiples(weight, self.block_columns, self.bits, self.scale_type)
        if found is None:
            return None
        multiples, steps = found
        middle = 1 << (self.bits - 1)
        zero_point = np.full(len(weight), middle, np.float32)
        codes = (multiples + middle).astype(np.uint8)
        grids = [_IntegerGrid(self.bits, self.asymmetric, scale, zero_point, self.scale_type) for scale in steps.T]
        return self.join([grid.pack(codes[:, block]) for block, grid in enumerate(grids)])

    def _encode(self, weight: Float32, importance: Float32 | None) -> Bytes:
        encoded = []
        for start in range(0, weight.shape[1], self.block_columns):
            columns = slice(start, start + self.block_columns)
            block = weight[:, columns]
            grid = self.grid(block, None if importance is None else importance[columns])
            encoded.append(grid.pack(grid.nearest(block.T).astype(np.uint8).T))
        return self.join(encoded)

    def grid(self, block: Float32, importance: Float32 | None) -> _IntegerGrid:
        """Choose scale and zero point of one block for every row, with the least weighted squared error.

        Clipped ranges are tried, the scale is fitted to the codes by least squares, and each row keeps its best.

        Raises:
            RequestError: the weights need a scale larger than the largest that can be stored.
        """
        weights = np.ones(self.block_columns, np.float32) if importance is None else importance
        # Columns first, so that sums over columns run along the rows.
        columns = np.array(block.T, order="C")
        low, high = columns.min(axis=0), columns.max(axis=0)
        if self.scale_type is np.float16:
            self._require_range(low, high)
        shares = CLIPPINGS if self.bits < 8 else CLIPPINGS[:1]
        candidates = [self._fitted(columns, weights, low * share, high * share) for share in shares]
        errors = np.stack([_error(grid, columns, weights) for grid in candidates])
        best = errors.argmin(axis=0)
        rows = np.arange(len(block))
        scale = np.stack([grid.scale for grid in candidates])[best, rows]
        zero_point = np.stack([grid.zero_point for grid in candidates])[best, rows]
        return _IntegerGrid(self.bits, self.asymmetric, scale, zero_point, self.scale_type)

    def _require_range(self, low: Float32, high: Float32) -> None:
        """Refuse a range that no float16 scale spans; each end is float32 [rows]."""
        steps = (1 << self.bits) - 1 if self.asymmetric else 1 << (self.bits - 1)
        most = float(np.finfo(np.float16).max) * steps
        spans = np.maximum(high, 0) - np.minimum(low, 0) if self.asymmetric else np.maximum(high, -low)
        if spans.max() > most:
            raise RequestError(
                f"{self.name} cannot hold weights so large",
                got=f"a block that spans {spans.max():.4g}",
                expected=f"at most {most:.4g}, since scales are stored in float16",
                next_step=f"choose {self.name}{FLOAT32_SUFFIX}",
            )

    def _fitted(self, columns: Float32, weights: Float32, low: Float32, high: Float32) -> _IntegerGrid:
        """Return the grid of a range, with its scale fitted to columns, float32 [block columns, rows]."""
        grid = self._ranged(low, high)
        if self.bits == 8:
            return grid
        steps = grid.nearest(columns)
        steps -= grid.zero_point
        norm, fit = weights @ (steps * steps), weights @ (steps * columns)
        fits = (norm > 0) & (fit > 0) if self.asymmetric else norm > 0
        scale = np.where(fits, fit / np.where(fits, norm, 1), grid.scale)
        return replace(grid, scale=_storable(np.where(scale == 0, grid.scale, scale), self.scale_type))

    def _ranged(self, low: Float32, high: Float32) -> _IntegerGrid:
        """Return the grid that spans from `low` to `high`, each float32 [rows]."""
        codes = (1 << self.bits) - 1
        if self.asymmetric:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scale = _storable((high - low) / codes, self.scale_type)
            zero_point = np.clip(np.rint(-low / scale), 0, codes)
        else:
            middle = 1 << (self.bits - 1)
            # The side with one more code gets the largest value: its sign decides the sign of the scale.
            scale = _storable(np.where(high > -low, high, low) / -middle, self.scale_type)
            zero_point = np.full(len(low), middle)
        return _IntegerGrid(self.bits, self.asymmetric, scale, zero_point.astype(np.float32), self.scale_type)

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks: all codes, all scales, all zero points."""
        stacked = np.stack(blocks, axis=1)
        rows = len(stacked)
        codes = self.block_columns * self.bits // 8
        parts = [stacked[:, :, :codes], stacked[:, :, codes : codes + self.scale_bytes]]
        joined = [part.reshape(rows, -1) for part in parts]
        if self.asymmetric:
            joined.append(_pack_bits(stacked[:, :, codes + self.scale_bytes], self.bits))
        return np.concatenate(joined, axis=1)

    @property
    def row_scaling(self) -> RowScaling | None:
        """How symmetric codes of 8 bits are stored with one scale for each row; None for other formats."""
        return RowScaling(self.scale_type, self._packed) if self.bits == 8 and not self.asymmetric else None

    def _packed(self, codes: Int8, scales: Bytes) -> Bytes:
        blocks, repeated = in_blocks(codes.view(np.uint8) + np.uint8(128), scales, self.block_columns)
        return np.concatenate([blocks.reshape(len(codes), -1), repeated.reshape(len(codes), -1)], axis=1)

    def split(self, data: Bytes, columns: int) -> tuple[Bytes, NDArray[np.generic], Bytes | None]:
        """Return codes [rows, blocks, bytes], scales as stored [rows, blocks], zero points uint8 [rows, bytes]."""
        codes, scales, _ = self._parts(columns)
        blocks = columns // self.block_columns
        packed = np.ascontiguousarray(data[:, :codes]).reshape(len(data), blocks, -1)
        scale = np.ascontiguousarray(data[:, codes : codes + scales]).view(self.scale_type)
        return packed, scale, np.ascontiguousarray(data[:, codes + scales :]) if self.asymmetric else None

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Decode rows as `MatMulNBits` does at accuracy level 0, float32 [rows, columns]."""
        packed, scale, zero_points = self.split(data, columns)
        rows, blocks = scale.shape
        codes = _unpack_bits(packed.reshape(rows, -1), self.bits).reshape(rows, blocks, self.block_columns)
        middle = np.float32(1 << (self.bits - 1))
        zero = (
            middle if zero_points is None else _unpack_bits(zero_points, self.bits)[:, :blocks, None].astype(np.float32)
        )
        return ((codes.astype(np.float32) - zero) * scale[:, :, None].astype(np.float32)).reshape(rows, columns)


def _storable(scale: NDArray[np.floating[Any]], stored: type[np.float16 | np.float32]) -> Float32:
    """Return the nearest storable values of scales; none is zero.

    Scales that are zero, or so small that a weight divided by them overflows, become 1, and the codes zero.
    """
    information = np.finfo(stored)
    nearest = np.clip(np.abs(scale), information.smallest_subnormal, information.max).astype(stored)
    usable = np.where(np.abs(scale) < SMALLEST_SCALE, 1, np.copysign(nearest, scale))
    return usable.astype(np.float32)


def _error(grid: _IntegerGrid, columns: Float32, weights: Float32) -> Float32:
    """Return each row's weighted squared error, float32 [rows]."""
    difference = grid._decoded(grid.nearest(columns))
    difference -= columns
    difference *= difference
    error: Float32 = weights @ difference
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
    made = (
        MatMulNBitsFormat(bits, block, odd, scales)
        for scales in (np.float16, np.float32)
        for bits in BITS
        for block in BLOCKS
        for odd in (False, True)
    )
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
