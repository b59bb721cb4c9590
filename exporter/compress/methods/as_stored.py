"""As stored: the codes of the source, in its own format or in one that holds the same weights; nothing is lost."""

from dataclasses import dataclass

import numpy as np

from exporter.calibrate.second_moments import Site
from exporter.compress.effort import Effort
from exporter.compress.method import AS_STORED, ExpectedError
from exporter.formats.format import EncodedMatrix, Float32, WeightFormat
from exporter.foundation.errors import RequestError
from exporter.model.model import Model


@dataclass(frozen=True)
class AsStored:
    """The codes of one matrix of a model; without a model, the method by name alone, which encodes nothing.

    Attributes:
        model: The model.
        matrix: Name of the matrix.
    """

    model: Model | None = None
    matrix: str = ""
    name = AS_STORED
    error_feedback = False
    supports_error_propagation = False
    keeps_codes = True

    def require(self, format: WeightFormat) -> None:
        """Accept every format: whether the source holds it is decided with the format."""

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Return the codes that the source holds.

        Raises:
            RequestError: it holds none that this format could hold.
        """
        codes = None if self.model is None else self.model.codes(self.matrix, format)
        if codes is None:
            raise RequestError(
                f"the source holds no codes of the type {format.name}", where=self.matrix or None,
                next_step="choose another method",
            )  # fmt: skip
        return EncodedMatrix(codes, format.decode_rows(codes, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Return no error."""
        return ExpectedError(np.zeros(len(weight)), np.zeros(len(weight)))


def at(effort: Effort) -> AsStored:
    """Return the method by name alone; it is the same at every effort."""
    return AsStored()
