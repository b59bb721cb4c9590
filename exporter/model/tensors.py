"""Lazy tensor sources."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite.

        Raises:
            InputError: the tensor holds NaN or infinity, or its bytes are missing.
        """

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite; no other row is read from files.

        Raises:
            InputError: as for `read`.
        """


def require_finite(values: Float32, name: str) -> Float32:
    """Return `values` if all are finite."""
    # The sum is finite if all elements are, unless it overflows. This needs one pass and no mask.
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise InputError(
            "the tensor holds NaN or infinity",
            where=name,
            got=f"{bad} of {values.size} values",
            expected="finite numbers",
            next_step="fetch or convert the model again",
        )
    return values
