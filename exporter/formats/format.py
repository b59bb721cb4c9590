"""The protocols that weight formats of targets implement and that compression methods use.

A matrix is stored row by row; a row is a whole number of blocks of `block_columns` weights. Rows are
independent of each other, so a target may reorder encoded rows without decoding them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Grid(Protocol):
    """The values that one block of columns can take once its scales are fixed, for every row."""

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return codes, uint8 [rows], and their decoded values, float32 [rows], for one column of the block."""

    def decode(self, codes: Bytes) -> Float32:
        """Decode codes, uint8 [block columns, rows], to float32 of the same shape."""

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "Grid":
        """Return the grid whose scales, as stored, are the best for the codes in every row.

        Args:
            codes: uint8 [block columns, rows].
            gram: G, float32 [block columns, block columns], symmetric and positive definite.
            aim: a, float32 [block columns, rows]: the weights q of a row should minimise q^T G q - 2 a^T q.
        """

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block, uint8 [rows, bytes of a block], from codes, uint8 [rows, block columns]."""


@runtime_checkable
class PartedGrid(Grid, Protocol):
    """A grid whose block has parts with their own scales, which can be chosen when feedback reaches them."""

    @property
    def part_columns(self) -> int:
        """Columns of a part."""

    def reached(self, column: int, values: Float32, importance: Float32) -> "PartedGrid":
        """Return the grid with the best scales for the values of one part; other parts keep theirs.

        Args:
            column: First column of the part.
            values: float32 [columns of the part, rows].
            importance: Cost of an error in each of its columns, float32 [columns of the part].
        """


def squared_error(weights: Float32, gram: Float32, aim: Float32) -> Float32:
    """Return q^T G q - 2 a^T q of each row: float32 [rows] for weights and aim, float32 [columns, rows]."""
    error: Float32 = np.einsum("ij,ij->j", weights, gram @ weights - 2 * aim)
    return error


def fitted_scale(levels: Float32, gram: Float32, aim: Float32) -> Float32:
    """Return the scale s of each row with the least error of the weights s times levels, float32 [columns, rows]."""
    square, product = np.einsum("ij,ij->j", levels, gram @ levels), np.einsum("ij,ij->j", levels, aim)
    scale: Float32 = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
    return scale


def fitted_line(levels: Float32, gram: Float32, aim: Float32) -> tuple[Float32, Float32]:
    """Return scale s and minimum m of each row with the least error of the weights s times levels plus m."""
    square, product = np.einsum("ij,ij->j", levels, gram @ levels), np.einsum("ij,ij->j", levels, aim)
    mixed, sums, ones = gram.sum(axis=0) @ levels, aim.sum(axis=0), gram.sum()
    determinant = square * ones - mixed * mixed
    # If all codes of a row are the same, any scale will do.
    solvable = determinant > 1e-6 * square * ones
    safe = np.where(solvable, determinant, 1)
    scale = np.where(solvable, (product * ones - sums * mixed) / safe, 0)
    return scale, (sums - scale * mixed) / ones


class WeightFormat(Protocol):
    """One way a runtime stores a matrix."""

    @property
    def name(self) -> str:
        """The format's own name, such as `Q4_K` or `int4-b32`."""

    @property
    def block_columns(self) -> int:
        """Weights of a row that share scales; a row is a whole number of such blocks."""

    @property
    def needs_importance(self) -> bool:
        """Whether the format cannot be encoded without importance."""

    @property
    def activation_block(self) -> int | None:
        """Number of inputs that the runtime rounds to 8 bits with one scale; None if it does not round them."""

    def fits(self, columns: int) -> bool:
        """Return whether a row of so many weights can be stored."""

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes in the file: codes, scales, zero points and padding."""

    def encode_rows(self, weight: Float32, importance: Float32 | None) -> Bytes:
        """Encode whole rows with the format's reference quantiser.

        Args:
            weight: float32 [rows, columns], finite.
            importance: float32 [columns], positive: the weight of each column's squared error; or None.

        Returns:
            uint8 [rows, bytes of a row].
        """

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Decode rows as the runtime does, float32 [rows, columns]."""

    def grid(self, block: Float32, importance: Float32 | None) -> Grid | None:
        """Fix the scales of one block, float32 [rows, block columns]; None if the format has no such grid."""

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks, in order of columns."""


@dataclass(frozen=True)
class LowRank:
    """The rank and the storage format of low-rank factors.

    Attributes:
        rank: Columns of L and rows of R.
        format: Format of the rows of both; the rank must therefore be a whole number of its blocks.
    """

    rank: int
    format: WeightFormat

    @property
    def name(self) -> str:
        """Such as `r64-Q8_0`."""
        return f"r{self.rank}-{self.format.name}"

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes in the file for the factors of a matrix of so many rows and columns."""
        return self.format.stored_bytes(rows, self.rank) + self.format.stored_bytes(self.rank, columns)


@dataclass(frozen=True)
class EncodedFactors:
    """L and R in a weight format.

    Attributes:
        low_rank: Rank and format.
        left: Encoded rows of L, uint8 [rows, bytes of a row of the rank's width].
        right: Encoded rows of R, uint8 [rank, bytes of a row].
    """

    low_rank: LowRank
    left: Bytes
    right: Bytes

    def added_to(self, base: Float32) -> Float32:
        """Return Q + L R as the runtime decodes them, float32 [rows, columns]."""
        decode = self.low_rank.format.decode_rows
        return plus(base, decode(self.left, self.low_rank.rank), decode(self.right, base.shape[1]))


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix in a weight format.

    Attributes:
        data: The encoded rows, uint8 [rows, bytes of a row].
        planned: The matrix that the runtime should decode, including factors, float32 [rows, columns].
        factors: Low-rank factors in addition to the encoded rows, if any.
    """

    data: Bytes
    planned: Float32
    factors: EncodedFactors | None = None


def plus(base: Float32, left: Float32, right: Float32) -> Float32:
    """Return Q + L R, float32 [rows, columns]; all sums are computed here, so that equal parts give equal sums."""
    total: Float32 = np.ascontiguousarray(left) @ np.ascontiguousarray(right)
    total += base
    return total
