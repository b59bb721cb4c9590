"""The step `rate`: error feedback in an 8-bit format, with steps for the bits that a coded file is to have.

See `exporter.compress.rate`. The file is the 8-bit one that the runtime has, which the step `transport` codes. With a
rank it has factors beside its matrices, as the step `caldera` has them, which take their share of the bits.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.layers import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.caldera import Turns
from exporter.compress.compressed import with_factors
from exporter.compress.equalise import Rewritten
from exporter.compress.method import MatrixMethod
from exporter.compress.rate import DEFAULT_BITS, in_even_columns, rated
from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.steps.step import CodedBits, CodedStep
from exporter.targets.target import Target, low_rank
from exporter.weights.group import Decision

# A weight beside factors; fewer are not worth a code.
LEAST_BITS = 1.0


class TargetRate(CodedStep):
    """Options of the step: those of every step for coding, and of factors.

    Attributes:
        rank: Of L R beside the matrices of the layers; None for no factors.
        factor_bits: Of a weight of L and R, within `bits`.
    """

    method: Literal["rate"]
    bits: CodedBits = DEFAULT_BITS
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    factor_bits: Literal[4, 8, 16] = 4

    @property
    def turns(self) -> Turns:
        """Factors come first: what they take of a matrix, its codes need not tell."""
        return Turns(("LR", "Q"))

    def decide(self, model: Model, target: Target) -> list[Decision]:
        """Return the target's 8 bits for every matrix, and the factors."""
        decisions = super().decide(model, target)
        if self.rank is None:
            return decisions
        decisions = with_factors(decisions, low_rank(target, self.rank, self.factor_bits))
        if self._left(decisions) < LEAST_BITS:
            raise RequestError(
                "the factors leave the matrices too few bits",
                got=f"{self._left(decisions):.2f} of {self.bits:g} beside factors of rank {self.rank}",
                expected=f"{LEAST_BITS} or more",
                next_step="choose a smaller rank or more bits",
            )
        return decisions

    def _left(self, decisions: Sequence[Decision]) -> float:
        """Return the bits a weight that factors leave."""
        factors = sum(one.stored_bytes - one.base_bytes for one in decisions)
        return self.bits - 8 * factors / sum(one.group.size for one in decisions)

    def suited(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model with columns that want one step."""
        return in_even_columns(model, statistics)

    def methods(
        self, decisions: Sequence[Decision], given: Rewritten, progress: Progress
    ) -> Mapping[str, MatrixMethod]:
        """Return the method for each matrix with its step."""
        groups = [one.group for one in decisions]
        ranks = {one.group.name: one.low_rank.rank for one in decisions if one.low_rank is not None}
        return dict(rated(given.model, given.statistics, groups, self._left(decisions), progress, ranks))


STEP = TargetRate
