"""What a method of compression is, and how it is found by name."""

from typing import Protocol

import numpy as np

from exporter.registry import load, names
from exporter.weights.format import EncodedMatrix, Float32, WeightFormat

NOT_METHODS = {"method", "compressed", "allocate", "equalise"}


class Method(Protocol):
    """A way to choose the codes of a matrix in a given format."""

    name: str
    needs_second_moment: bool

    def encode(self, weight: Float32, format: WeightFormat, second_moment: Float32 | None) -> EncodedMatrix:
        """Encode one matrix.

        Args:
            weight: float32 [rows, columns]; not changed.
            format: The format to encode in.
            second_moment: E[x x^T] of the inputs, float32 [columns, columns], or None where inputs are not observed.
        """


def method_names() -> list[str]:
    """Return the names of the methods."""
    return [name for name in names("exporter.compress") if name not in NOT_METHODS]


def load_method(name: str) -> Method:
    """Return a method by name.

    Raises:
        RequestError: there is no such method.
    """
    method: Method = load("exporter.compress.{}", name, method_names(), "method").METHOD
    return method


def importance_of(second_moment: Float32 | None) -> Float32 | None:
    """Return E[x^2] of the columns: the diagonal of the second moment."""
    return None if second_moment is None else np.ascontiguousarray(second_moment.diagonal())


def relative_error(weight: Float32, planned: Float32, second_moment: Float32 | None) -> float:
    """Return E|Dx|^2 / E|Wx|^2 of the change D = planned - W: the relative squared output error."""
    change = planned - weight
    if second_moment is None:
        return float((change**2).sum(dtype=np.float64) / (weight**2).sum(dtype=np.float64))
    error = np.einsum("ij,ij->", change @ second_moment, change, dtype=np.float64)
    return float(error / np.einsum("ij,ij->", weight @ second_moment, weight, dtype=np.float64))
