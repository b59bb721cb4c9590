"""Lazy tensor sources."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32
from exporter.formats.group import WeightGroup
from exporter.formats.integers import Integers
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


def sliced(source: TensorSource, stored: Mapping[str, Sequence[WeightGroup]]) -> TensorSource:
    """Return the tensors of a source with matrices in place of the tensors that hold the rows of several.

    Args:
        source: The source.
        stored: Name of each tensor -> the matrices whose rows it holds, in order.
    """
    slices: dict[str, tuple[str, int, int]] = {}
    for name, groups in stored.items():
        first = 0
        for group in groups if len(groups) > 1 else ():
            slices[group.name] = name, first, group.rows
            first += group.rows
    return _Sliced(source, slices) if slices else source


class _Sliced:
    def __init__(self, source: TensorSource, slices: Mapping[str, tuple[str, int, int]]) -> None:
        self._source, self._slices = source, slices
        self.files = source.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        held = self._source.shapes()
        parts = {name: (rows, *held[stored][1:]) for name, (stored, _, rows) in self._slices.items()}
        whole = {stored for stored, _, _ in self._slices.values()}
        return {name: shape for name, shape in held.items() if name not in whole} | parts

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        if name not in self._slices:
            return self._source.read(name)
        stored, first, rows = self._slices[name]
        return self._source.read_rows(stored, np.arange(first, first + rows))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        stored, first, _ = self._slices.get(name, (name, 0, 0))
        return self._source.read_rows(stored, rows + first)


@runtime_checkable
class HoldsCodes(Protocol):
    """A source that holds matrices in the formats of a runtime."""

    def stored_type(self, name: str) -> str | None:
        """Return the name of a matrix's format; None if it holds none of that name, or not as it is."""

    def integers(self, name: str) -> Integers | None:
        """Return the integers that a matrix of that format consists of; None if it has offsets or other levels."""

    def codes(self, name: str) -> Bytes:
        """Return the encoded rows of a matrix, uint8 [rows, bytes], in the source's order of rows."""


@runtime_checkable
class HoldsFactors(Protocol):
    """A source that holds factors of an adapter beside matrices: what runs is W + L R."""

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of the factors of each matrix that has some, by its name."""

    def factors(self, name: str) -> tuple[Float32, Float32]:
        """Return L, float32 [rows, rank], and R, float32 [rank, columns], of a matrix of `ranks`."""


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
