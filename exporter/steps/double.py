"""The step `double`: 8-bit integers with steps so coarse that a coded file is small (double compression).

After Wang et al. 2025; see `exporter.compress.double`. The file is the 8-bit one that the runtime has, which the step
`transport` codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.statistics import Statistics
from exporter.compress.double import DEFAULT_BITS, ZEROED, doubled, in_scaled_channels
from exporter.compress.equalise import Rewritten
from exporter.compress.method import Method
from exporter.model.model import Model
from exporter.steps.step import EncodingStep
from exporter.targets.target import Target
from exporter.weights.group import Decision, WeightGroup


class DoubleCompression(EncodingStep):
    """Options of the step.

    Attributes:
        bits: Of a weight, on average over all matrices, when the file is coded; tables and scales included.
        equalise: Scale channels by how far the inputs reach, absorbed by what comes before each matrix.
        zeroed: Share of the weights that become zero because they can move the outputs least.
    """

    method: Literal["double"]
    bits: Annotated[float, Field(ge=1, le=6)] = DEFAULT_BITS
    equalise: bool = True
    zeroed: Annotated[float, Field(ge=0, lt=1)] = ZEROED

    def decide(self, model: Model, target: Target) -> list[Decision]:
        """Return the target's 8 bits for every matrix."""
        reason = f"{self.method} by the recipe: {self.bits:g} bits a weight on average when coded"
        return [replace(one, reason=reason) for one in target.decide(model, target.type_of_8_bits, self.method)]

    def coordinates(self, target: Target, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model with channels scaled, or as the target has it."""
        if self.equalise:
            return in_scaled_channels(model, statistics)
        return super().coordinates(target, model, statistics, decisions)

    def methods(
        self,
        groups: Sequence[WeightGroup],
        model: Model,
        statistics: Statistics,
        progress: Callable[[int, int], None],
    ) -> Mapping[str, Method]:
        """Return the method for each matrix with its step."""
        return dict(doubled(model, statistics, groups, self.bits, self.zeroed, progress))


STEP = DoubleCompression
