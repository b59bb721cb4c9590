"""8-bit formats with one step per row, chosen by the encoder so that entropy coding makes the file small.

With coarse steps only a few of the 256 codes occur, and equal scales repeat, so both take few bits in a coded file. The
runtime loads the restored file like any other of its 8-bit files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32, WeightFormat
from exporter.foundation.errors import RequestError

LARGEST_CODE = 127
_SMALLEST = {np.float16: np.float32(2**-24), np.float32: np.float32(1e-30)}
Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class RowScaling:
    """How a format of symmetric 8-bit codes stores codes whose scales the encoder chose.

    Attributes:
        scale_type: Type of the stored scales.
        pack: Returns encoded rows, uint8 [rows, bytes of a row], from codes, int8 [rows, columns], and one scale a row
            as stored, uint8 [rows, bytes of a scale].
    """

    scale_type: type[np.float16 | np.float32]
    pack: Callable[[Int8, Bytes], Bytes]


@runtime_checkable
class RowScaled(Protocol):
    """A weight format that may take one scale for a whole row."""

    @property
    def row_scaling(self) -> RowScaling | None:
        """How it stores such rows; None if its codes are not symmetric ones of 8 bits."""


def _scaling(format: WeightFormat) -> RowScaling:
    scaling = format.row_scaling if isinstance(format, RowScaled) else None
    if scaling is None:
        raise RequestError(
            "steps can be chosen in symmetric formats of 8 bits only", got=format.name,
            next_step="choose the target's own type of 8 bits",
        )  # fmt: skip
    return scaling


def scale_type(format: WeightFormat) -> type[np.float16 | np.float32]:
    """Return the type in which a format stores its scales.

    Raises:
        RequestError: it is not a symmetric format of 8 bits.
    """
    return _scaling(format).scale_type


def stored_steps(format: WeightFormat, steps: Float32) -> Float32:
    """Return steps, float32 [rows], as a format stores them.

    Raises:
        RequestError: a step exceeds the range of the format's scales.
    """
    stored = scale_type(format)
    if steps.max(initial=0) > np.finfo(stored).max:
        raise RequestError("a step is beyond the scales of the format", where=format.name, got=steps.max())
    return np.maximum(steps, _SMALLEST[stored]).astype(stored).astype(np.float32)


def encode_steps(format: WeightFormat, codes: Int8, steps: Float32) -> Bytes:
    """Return encoded rows, uint8 [rows, bytes of a row].

    Args:
        format: A symmetric format of 8 bits.
        codes: int8 [rows, columns].
        steps: One for each row, as stored, float32 [rows].
    """
    scaling = _scaling(format)
    return scaling.pack(codes, steps.astype(scaling.scale_type)[:, None].view(np.uint8))


def in_blocks(rows: Bytes, scales: Bytes, columns: int) -> tuple[Bytes, Bytes]:
    """Return codes, uint8 [rows, blocks, columns of a block], and each block's copy of its row's scale."""
    blocks = rows.reshape(len(rows), -1, columns)
    return blocks, np.broadcast_to(scales[:, None], (*blocks.shape[:2], scales.shape[1]))
