"""The interface of compression methods, and how a method is found by name."""

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.second_moments import Site
from exporter.compress.effort import EFFORTS, Effort
from exporter.formats.format import EncodedMatrix, Float32, WeightFormat
from exporter.foundation.registry import load, names

METHODS = "exporter.compress.methods"
# The method whose codes are the source's.
AS_STORED = "as-stored"
# More rows at a time would only take more memory.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class ExpectedError:
    """The expected error of a method's change D of some rows, on text like the calibration text.

    Attributes:
        outputs: E|D x|^2 of each row, float64 [rows]; zeros where the inputs x were not observed.
        lookups: E[D^2] of each row, weighted by the columns' sensitivities and summed, float64 [rows].
    """

    outputs: NDArray[np.float64]
    lookups: NDArray[np.float64]


class Method(Protocol):
    """A way to choose the codes of a matrix in a given format.

    Attributes:
        name: Its name, which is that of its file.
        error_feedback: The rounding error of a column is corrected in later columns, by the inputs' second moments.
        supports_error_propagation: The method encodes whatever target it is given, by the inputs of that matrix. Scaled
            channels and error propagation lower the loss of such a method.
        keeps_codes: The codes are the source's, so that its matrices are neither scaled nor compensated for, and take
            no time to encode.
    """

    name: str
    error_feedback: bool
    supports_error_propagation: bool
    keeps_codes: bool

    def require(self, format: WeightFormat) -> None:
        """Refuse a format that the method does not support.

        Raises:
            RequestError: the method does not support it.
        """

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix.

        Args:
            weight: float32 [rows, columns]; not changed.
            format: The format to encode in.
            site: Statistics of the inputs, or None if they were not observed.
        """

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Predict the error of some rows without fitting them to the text.

        Args:
            weight: float32 [rows, columns]; not changed.
            format: The format that they would be encoded in.
            site: As for `encode`.
            columns: Sensitivities of the columns if rows are looked up, float32 [columns].
        """


class MatrixMethod(Method, Protocol):
    """A method for one matrix, with settings for its rows."""

    def of_rows(self, rows: NDArray[np.int64]) -> Self:
        """Return the method for some of its rows."""


def spread_rows(rows: int, count: int) -> NDArray[np.int64]:
    """Return the indices of at most `count` rows, spaced evenly, since neighbouring rows belong to one head."""
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).astype(np.int64))


def method_names() -> list[str]:
    """Return the names of the methods."""
    return names(METHODS)


def load_method(name: str, effort: Effort) -> Method:
    """Return a method by name, with the settings of an effort.

    Raises:
        RequestError: there is no such method.
    """
    method: Method = load(f"{METHODS}.{{}}", name, method_names(), "method").at(effort)
    return method


def method_kind(name: str) -> Method:
    """Return a method by name, to ask for its properties.

    Raises:
        RequestError: there is no such method.
    """
    return load_method(name, EFFORTS["balanced"])


def relative_error(weight: Float32, planned: Float32, second_moment: Float32 | None) -> float | None:
    """Return E|Dx|^2 / E|Wx|^2 of the change D = planned - W: the relative squared output error.

    It is None if E|Wx|^2 is zero: the matrix is zero, or its inputs always were.
    """
    error = size = 0.0
    for first in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        error += _outputs_squared(planned[rows] - weight[rows], second_moment)
        size += _outputs_squared(weight[rows], second_moment)
    return error / size if size > 0 else None


def _outputs_squared(weight: Float32, second_moment: Float32 | None) -> float:
    """Return E|Wx|^2, or the sum of squares of the weights if the inputs x were not observed."""
    if second_moment is None:
        return float((weight**2).sum(dtype=np.float64))
    return float(np.einsum("ij,ij->", weight @ second_moment, weight, dtype=np.float64))
