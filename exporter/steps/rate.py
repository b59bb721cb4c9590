"""The step `rate`: error feedback in an 8-bit format, with steps for the bits that a coded file is to have.

See `exporter.compress.rate`. The file is the 8-bit one that the runtime has, which the step `transport` codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.statistics import Statistics
from exporter.compress.equalise import Rewritten
from exporter.compress.method import Method
from exporter.compress.rate import DEFAULT_BITS, in_even_columns, rated
from exporter.model.model import Model
from exporter.steps.step import EncodingStep
from exporter.targets.target import Target
from exporter.weights.group import Decision, WeightGroup


class TargetRate(EncodingStep):
    """Options of the step.

    Attributes:
        bits: Of a weight, on average over all matrices, when the file is coded; tables and scales included.
        equalise: Let every column of a matrix want the same step, absorbed by what comes before the matrix.
    """

    method: Literal["rate"]
    bits: Annotated[float, Field(ge=1, le=6)] = DEFAULT_BITS
    equalise: bool = True

    def decide(self, model: Model, target: Target) -> list[Decision]:
        """Return the target's 8 bits for every matrix."""
        reason = f"{self.method} by the recipe: {self.bits:g} bits a weight on average when coded"
        return [replace(one, reason=reason) for one in target.decide(model, target.type_of_8_bits, self.method)]

    def coordinates(self, target: Target, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model with columns that want one step, or as the target has it."""
        if self.equalise:
            return in_even_columns(model, statistics)
        return super().coordinates(target, model, statistics, decisions)

    def methods(
        self,
        groups: Sequence[WeightGroup],
        model: Model,
        statistics: Statistics,
        progress: Callable[[int, int], None],
    ) -> Mapping[str, Method]:
        """Return the method for each matrix with its step."""
        return dict(rated(model, statistics, groups, self.bits, progress))


STEP = TargetRate
