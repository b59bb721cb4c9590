"""Blocks of 256 whose parts have their own scales: small whole numbers times a float16 of the whole block.

In a row's block, part p with codes L_p decodes to d S_p L_p - e M_p: S and M are the whole numbers, d and e the
float16 numbers; types without minima lack the second term. d and e start as ggml chooses them for the block. When
error feedback reaches a part, S and M are chosen for the values that the part has then. Descent moves S and M of one
part at a time to the best whole numbers with all else fixed, then d and e to their least-squares values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32, squared_error
from exporter.targets.gguf.formats.bit_layouts import Layout
from exporter.targets.gguf.formats.codebooks import LevelGrid


@dataclass(frozen=True)
class Nesting:
    """How a block stores the scales of its parts.

    Attributes:
        lowest: Smallest whole number of a part's scale.
        highest: Largest one; minima are from 0 to it.
        d: First byte of the float16 by which all scales are multiplied.
        e: First byte of the float16 by which all minima are multiplied; None without minima.
        put: Writes scales and minima, int [parts, rows], into encoded blocks, uint8 [rows, bytes of a block].
    """

    lowest: int
    highest: int
    d: int
    e: int | None
    put: Callable[[Bytes, Bytes, Bytes], None]


def _put_q2_k(blocks: Bytes, scales: Bytes, minima: Bytes) -> None:
    blocks[:, :16] = (scales | (minima << np.uint8(4))).T


def _put_q4_k(blocks: Bytes, scales: Bytes, minima: Bytes) -> None:
    """Six bits each: the first four parts whole, the others' upper two bits above them (`get_scale_min_k4`)."""
    for first, numbers in ((4, scales), (8, minima)):
        blocks[:, first : first + 4] = (numbers[:4] | (numbers[4:] >> np.uint8(4) << np.uint8(6))).T
    blocks[:, 12:16] = ((scales[4:] & np.uint8(15)) | (minima[4:] << np.uint8(4))).T


def _put_q3_k(blocks: Bytes, scales: Bytes, minima: Bytes) -> None:
    """Six bits each, 32 added: low nibbles of parts p and p + 8 in byte p, then high bits of four parts a byte."""
    raised = scales + np.uint8(32)
    blocks[:, 96:104] = ((raised[:8] & np.uint8(15)) | (raised[8:] << np.uint8(4))).T
    high = (raised >> np.uint8(4)).reshape(4, 4, -1) << np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    blocks[:, 104:108] = np.bitwise_or.reduce(high, axis=0).T


def _put_q6_k(blocks: Bytes, scales: Bytes, minima: Bytes) -> None:
    blocks[:, 192:208] = scales.T


def _put_iq4_xs(blocks: Bytes, scales: Bytes, minima: Bytes) -> None:
    """Six bits each, 32 added: high bits of four parts a byte, then low nibbles of two."""
    raised = scales + np.uint8(32)
    high = (raised >> np.uint8(4)).reshape(2, 4, -1) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    blocks[:, 2:4] = np.bitwise_or.reduce(high, axis=1).T
    blocks[:, 4:8] = ((raised[::2] & np.uint8(15)) | (raised[1::2] << np.uint8(4))).T


NESTINGS = {
    "Q2_K": Nesting(0, 15, 80, 82, _put_q2_k),
    "Q3_K": Nesting(-32, 31, 108, None, _put_q3_k),
    "Q4_K": Nesting(0, 63, 0, 2, _put_q4_k),
    "Q5_K": Nesting(0, 63, 0, 2, _put_q4_k),
    "Q6_K": Nesting(-128, 127, 208, None, _put_q6_k),
    "IQ4_XS": Nesting(-32, 31, 0, None, _put_iq4_xs),
}


@dataclass(frozen=True)
class Scales:
    """The scales of one block in every row.

    Attributes:
        d: float32 [rows], with float16 precision.
        e: Likewise; zeros without minima.
        scales: Whole numbers S, float32 [parts, rows].
        minima: Whole numbers M, float32 [parts, rows].
    """

    d: Float32
    e: Float32
    scales: Float32
    minima: Float32

    @classmethod
    def of(cls, nesting: Nesting, blocks: Bytes, scale: Float32, minimum: Float32) -> "Scales":
        """Read scales from encoded blocks and from each part's scale and minimum, float32 [parts, rows]."""
        d = _float16(blocks, nesting.d)
        e = np.zeros_like(d) if nesting.e is None else _float16(blocks, nesting.e)
        return cls(d, e, _whole(scale, d), _whole(-minimum, e))

    def fitted_part(
        self, nesting: Nesting, part: int, levels: Float32, values: Float32, importance: Float32
    ) -> "Scales":
        """Return scales with those of one part fitted by least squares; see `NestedGrid.reached` for the arguments."""
        weights = importance[:, None] / importance.sum()
        minimum = np.zeros_like(self.e)
        if nesting.e is None:
            scale = _ratio((weights * levels * values).sum(axis=0), (weights * levels**2).sum(axis=0))
            numbers = self._nearest(nesting, scale)
        else:
            middle, mean = (weights * levels).sum(axis=0), (weights * values).sum(axis=0)
            away = levels - middle
            scale = _ratio((weights * away * values).sum(axis=0), (weights * away**2).sum(axis=0))
            numbers = self._nearest(nesting, scale)
            minimum = np.clip(np.rint(_ratio(numbers * self.d * middle - mean, self.e)), 0, nesting.highest)
        scales, minima = self.scales.copy(), self.minima.copy()
        scales[part], minima[part] = numbers, minimum
        return replace(self, scales=scales, minima=minima)

    def _nearest(self, nesting: Nesting, scale: Float32) -> Float32:
        """Return the whole numbers, float32 [rows], that are closest to scales."""
        numbers: Float32 = np.clip(np.rint(_ratio(scale, self.d)), nesting.lowest, nesting.highest)
        return numbers

    def refitted(self, nesting: Nesting, levels: Float32, gram: Float32, aim: Float32) -> "Scales":
        """Return better scales for the levels of the codes, float32 [256, rows]; see `Grid.refit`."""
        parts = levels.reshape(len(self.scales), -1, levels.shape[1])
        scales, minima = self.scales.copy(), self.minima.copy()
        slope = gram @ self.decode(parts).reshape(levels.shape) - aim
        width = parts.shape[1]
        for part, own in enumerate(parts):
            columns = slice(part * width, (part + 1) * width)
            within = np.ascontiguousarray(gram[columns, columns])
            change = self._moved(nesting, part, own, within, slope[columns], scales, minima)
            slope += gram[:, columns] @ change
        return Scales(self.d, self.e, scales, minima)._refitted_factors(nesting, parts, gram, aim)

    def _moved(
        self, nesting: Nesting, part: int, levels: Float32, gram: Float32, slope: Float32,
        scales: Float32, minima: Float32,
    ) -> Float32:  # fmt: skip
        """Move one part's whole numbers in place if that is better, and return the change of its weights."""
        across = gram @ levels
        square, along = _dot(levels, across), _dot(levels, slope)
        if nesting.e is None:
            step = -_ratio(along, square)
        else:
            ones, mixed, down = gram.sum(), across.sum(axis=0), slope.sum(axis=0)
            determinant = square * ones - mixed * mixed
            solvable = determinant > 1e-6 * square * ones
            step = np.where(solvable, _ratio(mixed * down - ones * along, determinant), 0)
        moved = np.clip(np.rint(scales[part] + _ratio(step, self.d)), nesting.lowest, nesting.highest)
        change: Float32 = levels * ((moved - scales[part]) * self.d)
        other = minima[part]
        if nesting.e is not None:
            rest = -((moved - scales[part]) * self.d * mixed + down) / ones
            other = np.clip(np.rint(minima[part] - _ratio(rest, self.e)), 0, nesting.highest)
            change -= (other - minima[part]) * self.e
        better = _dot(change, gram @ change + 2 * slope) < 0
        scales[part] = np.where(better, moved, scales[part])
        minima[part] = np.where(better, other, minima[part])
        change *= better
        return change

    def _refitted_factors(self, nesting: Nesting, parts: Float32, gram: Float32, aim: Float32) -> "Scales":
        """Return the same whole numbers with the best d and e for them."""
        flat = (-1, parts.shape[2])
        up = (parts * self.scales[:, None]).reshape(flat)
        across = gram @ up
        square, along = _dot(up, across), _dot(up, aim)
        if nesting.e is None:
            d, e = _ratio(along, square), self.e
        else:
            below = np.repeat(self.minima, parts.shape[1], axis=0)
            deep = gram @ below
            ones, mixed, down = _dot(below, deep), _dot(below, across), _dot(below, aim)
            determinant = square * ones - mixed * mixed
            solvable = determinant > 1e-6 * square * ones
            d = np.where(solvable, _ratio(along * ones - mixed * down, determinant), self.d)
            e = np.where(solvable, _ratio(mixed * along - square * down, determinant), self.e)
        with np.errstate(over="ignore"):
            d, e = (number.astype(np.float16).astype(np.float32) for number in (d, e))
        usable = np.isfinite(d) & np.isfinite(e)
        other = self.where(usable, replace(self, d=d, e=e))
        before, after = (squared_error(one.decode(parts).reshape(flat), gram, aim) for one in (self, other))
        return self.where(after < before, other)

    def where(self, better: NDArray[np.bool_], other: "Scales") -> "Scales":
        """Return the other scales in the rows where they are better, bool [rows]."""
        return Scales(
            np.where(better, other.d, self.d),
            np.where(better, other.e, self.e),
            np.where(better, other.scales, self.scales),
            np.where(better, other.minima, self.minima),
        )

    def decode(self, parts: Float32) -> Float32:
        """Return weights from the levels of the codes, both float32 [parts, columns of a part, rows]."""
        decoded: Float32 = parts * (self.d * self.scales)[:, None] - (self.e * self.minima)[:, None]
        return decoded

    def put(self, nesting: Nesting, blocks: Bytes) -> None:
        """Write the scales into encoded blocks."""
        nesting.put(blocks, *(numbers.astype(np.int8).view(np.uint8) for numbers in (self.scales, self.minima)))
        for first, number in ((nesting.d, self.d), (nesting.e, self.e)):
            if first is not None:
                blocks[:, first : first + 2] = number.astype(np.float16)[:, None].view(np.uint8)


class NestedGrid(LevelGrid):
    """Chooses the codes of one block of 256 column by column; a part's scales can be chosen when it is reached.

    Args:
        layout: Layout of the format.
        blocks: Encoded blocks, uint8 [rows, bytes of a block].
        nesting: Nesting of the format.
        scales: Scales of the blocks.
    """

    def __init__(self, layout: Layout, blocks: Bytes, nesting: Nesting, scales: Scales) -> None:
        super().__init__(layout, blocks, scales.d * scales.scales, -scales.e * scales.minima)
        self._nesting = nesting
        self._scales = scales

    @property
    def part_columns(self) -> int:
        """Columns that share a scale and a minimum."""
        return self._layout.columns

    def reached(self, column: int, values: Float32, importance: Float32) -> "NestedGrid":
        """Return the grid with the best scales for the values of a part; other parts keep theirs.

        Args:
            column: First column of the part.
            values: float32 [columns of the part, rows].
            importance: Cost of an error in each of its columns, float32 [columns of the part].
        """
        codes, rounded = self.round(column, values)
        part = column // self._layout.columns
        scales = self._scales.fitted_part(self._nesting, part, self._layout.levels[codes], values, importance)
        other = self._with(scales)
        after = importance @ (other.round(column, values)[1] - values) ** 2
        better = after < importance @ (rounded - values) ** 2
        return self._with(self._scales.where(better, scales))

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "NestedGrid":
        """Return the grid with better scales for the codes."""
        return self._with(self._scales.refitted(self._nesting, self._layout.levels[codes], gram, aim))

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block, uint8 [rows, bytes of a block]."""
        blocks = super().pack(codes)
        self._scales.put(self._nesting, blocks)
        return blocks

    def _with(self, scales: Scales) -> "NestedGrid":
        return NestedGrid(self._layout, self._blocks, self._nesting, scales)


def _float16(blocks: Bytes, first: int) -> Float32:
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)[:, 0].astype(np.float32)


def _whole(values: Float32, factor: Float32) -> Float32:
    return np.rint(_ratio(values, np.broadcast_to(factor, values.shape)))


def _dot(one: Float32, other: Float32) -> Float32:
    product: Float32 = np.einsum("ij,ij->j", one, other)
    return product


def _ratio(numerator: Float32, denominator: Float32) -> Float32:
    """Return the quotient, zero where the denominator is zero."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
