"""The step `coarse-int8`: 8-bit integers with steps so coarse that a coded file is small (double compression).

After Wang et al. 2025; see `exporter.compress.methods.coarse_int8`. The file is in the runtime's 8-bit format; the step
`transport` codes it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.layer_stream import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.method import MatrixMethod
from exporter.compress.methods.coarse_int8 import DEFAULT_BITS, ZEROED, coarse_int8_methods, in_scaled_channels
from exporter.formats.group import Decision
from exporter.model.model import Model
from exporter.planning.step import CodedBits, CodedStep


class CoarseInt8Step(CodedStep):
    """Options of the step.

    Attributes:
        zeroed: Share of the weights that become zero because they can move the outputs least.
    """

    method: Literal["coarse-int8"]
    bits: CodedBits = DEFAULT_BITS
    zeroed: Annotated[float, Field(ge=0, lt=1)] = ZEROED

    def suited(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model with channels scaled by the magnitude of the inputs."""
        return in_scaled_channels(model, statistics)

    def methods(
        self, decisions: Sequence[Decision], given: Rewritten, progress: Progress
    ) -> Mapping[str, MatrixMethod]:
        """Return the method for each matrix with its step."""
        groups = [one.group for one in decisions]
        return dict(coarse_int8_methods(given.model, given.statistics, groups, self.bits, self.zeroed, progress))


STEP = CoarseInt8Step
