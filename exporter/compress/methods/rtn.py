"""Round to nearest: every weight is rounded independently; scales are weighted by the importance of the columns."""

import numpy as np

from exporter.calibrate.second_moments import Site
from exporter.compress.effort import Effort
from exporter.compress.method import ExpectedError
from exporter.formats.format import EncodedMatrix, Float32, WeightFormat


class RoundToNearest:
    """The format's reference quantiser, as the runtime's own tools would use it."""

    name = "rtn"
    supports_error_propagation = False
    error_feedback = False
    keeps_codes = False

    def require(self, format: WeightFormat) -> None:
        """Accept every format."""

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix with the format's reference quantiser and llama.cpp's importance."""
        data = format.encode_rows(weight, None if site is None else site.squares)
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Return the actual error: it depends on no more than the columns' importance."""
        return error_of(self.encode(weight, format, site).planned - weight, site, columns)


def error_of(change: Float32, site: Site | None, columns: Float32) -> ExpectedError:
    """Return the error of a change of some rows, float32 [rows, columns], that was not fitted to the text."""
    outputs = np.zeros(len(change))
    if site is not None:
        outputs += np.einsum("ij,ij->i", change @ site.second_moment, change)
    return ExpectedError(outputs, (change**2 @ columns).astype(np.float64))


def at(effort: Effort) -> RoundToNearest:
    """Return the method; it is the same at every effort."""
    return RoundToNearest()
