"""The step `double`: 8-bit integers with steps so coarse that a coded file is small (double compression).

After Wang et al. 2025; see `exporter.compress.double`. The file is the 8-bit one that the runtime has, which the step
`transport` codes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.layers import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.double import DEFAULT_BITS, ZEROED, doubled, in_scaled_channels
from exporter.compress.equalise import Rewritten
from exporter.compress.method import MatrixMethod
from exporter.model.model import Model
from exporter.steps.step import CodedBits, CodedStep
from exporter.weights.group import Decision


class DoubleCompression(CodedStep):
    """Options of the step.

    Attributes:
        zeroed: Share of the weights that become zero because they can move the outputs least.
    """

    method: Literal["double"]
    bits: CodedBits = DEFAULT_BITS
    zeroed: Annotated[float, Field(ge=0, lt=1)] = ZEROED

    def suited(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model with channels scaled by the inputs' loudness."""
        return in_scaled_channels(model, statistics)

    def methods(
        self, decisions: Sequence[Decision], given: Rewritten, progress: Progress
    ) -> Mapping[str, MatrixMethod]:
        """Return the method for each matrix with its step."""
        groups = [one.group for one in decisions]
        return dict(doubled(given.model, given.statistics, groups, self.bits, self.zeroed, progress))


STEP = DoubleCompression
