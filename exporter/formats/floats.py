"""Floating-point numbers as a weight format, which belongs to no runtime: every file format has them."""

from dataclasses import dataclass

import numpy as np

from exporter.formats.format import Bytes, Float32
from exporter.foundation.errors import InputError


@dataclass(frozen=True)
class FloatFormat:
    """Each weight as the nearest number of a type."""

    name: str
    type: type[np.float16 | np.float32]
    block_columns: int = 1
    needs_importance: bool = False
    activation_block: int | None = None

    def fits(self, columns: int) -> bool:
        """Return True: a row may have any number of weights."""
        return True

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the numbers."""
        return rows * columns * np.dtype(self.type).itemsize

    def encode_rows(self, weight: Float32, importance: Float32 | None) -> Bytes:
        """Encode whole rows; the importance is ignored.

        Raises:
            InputError: a weight is not finite.
        """
        if not np.isfinite(weight.sum(dtype=np.float64)):
            raise InputError("the weights to encode hold NaN or infinity", where=self.name)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(weight, self.type).view(np.uint8)

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Decode rows, float32 [rows, columns]."""
        # A copy, since the bytes may be those of a file that is mapped for reading.
        return np.ascontiguousarray(data).view(self.type).astype(np.float32)

    def grid(self, block: Float32, importance: Float32 | None) -> None:
        """Return None: there are no scales to fix."""

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks."""
        return np.concatenate(blocks, axis=1)


FLOAT32 = FloatFormat("F32", np.float32)
FLOAT16 = FloatFormat("F16", np.float16)
