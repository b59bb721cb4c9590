"""The protocols that a target's weight formats fulfil and that compression methods use.

A matrix is stored row by row; a row is a whole number of blocks of `block_columns` weights. Rows are
independent of each other, so a target may reorder encoded rows without decoding them.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix in a weight format.

    Attributes:
        data: The encoded rows, uint8 [rows, bytes of a row].
        planned: What the runtime is meant to multiply with, float32 [rows, columns].
    """

    data: Bytes
    planned: Float32


class Grid(Protocol):
    """The values one block of columns can take once its scales are fixed, for every row."""

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return codes, uint8 [rows], and what they decode to, float32 [rows], for one column of the block."""

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block, uint8 [rows, bytes of a block], from codes, uint8 [rows, block columns]."""


class WeightFormat(Protocol):
    """One way a runtime stores a matrix."""

    @property
    def name(self) -> str:
        """The format's own name, such as `Q4_K` or `int4-b32`."""

    @property
    def block_columns(self) -> int:
        """Weights of a row that share scales; columns come in whole blocks of it."""

    @property
    def needs_importance(self) -> bool:
        """Whether the format cannot be encoded without importance."""

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
        """Return what the runtime multiplies with, float32 [rows, columns]."""

    def grid(self, block: Float32, importance: Float32 | None) -> Grid | None:
        """Fix the scales of one block, float32 [rows, block columns]; None where scales span several blocks."""

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks, in order of columns."""
