"""Round to nearest: every weight on its own, scales weighted by the importance of the columns."""

from exporter.compress.method import importance_of
from exporter.weights.format import EncodedMatrix, Float32, WeightFormat


class RoundToNearest:
    """The format's reference quantiser, as the runtime's own tools would use it."""

    name = "rtn"
    needs_second_moment = False

    def encode(self, weight: Float32, format: WeightFormat, second_moment: Float32 | None) -> EncodedMatrix:
        """Encode one matrix with the format's reference quantiser."""
        data = format.encode_rows(weight, importance_of(second_moment))
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))


METHOD = RoundToNearest()
