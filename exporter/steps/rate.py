"""The step `rate`: error feedback in an 8-bit format, with steps for the bits that a coded file is to have.

See `exporter.compress.rate`. The file is the 8-bit one that the runtime has, which the step `transport` codes.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from exporter.calibrate.layers import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.equalise import Rewritten
from exporter.compress.method import Method
from exporter.compress.rate import DEFAULT_BITS, in_even_columns, rated
from exporter.model.model import Model
from exporter.steps.step import CodedBits, CodedStep
from exporter.weights.group import WeightGroup


class TargetRate(CodedStep):
    """Options of the step: those of every step for coding."""

    method: Literal["rate"]
    bits: CodedBits = DEFAULT_BITS

    def suited(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model with columns that want one step."""
        return in_even_columns(model, statistics)

    def methods(self, groups: Sequence[WeightGroup], given: Rewritten, progress: Progress) -> Mapping[str, Method]:
        """Return the method for each matrix with its step."""
        return dict(rated(given.model, given.statistics, groups, self.bits, progress))


STEP = TargetRate
