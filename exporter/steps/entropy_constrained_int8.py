"""The step `entropy-constrained-int8`: error feedback in 8 bits, with steps for the size of a coded file.

See `exporter.compress.methods.entropy_constrained_int8`. The file is in the runtime's 8-bit format; the step
`transport` codes it. With a rank, matrices have low-rank factors as in the step `caldera`, which take their part of
the bits.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.layer_stream import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.caldera import Alternation
from exporter.compress.checks import with_factors
from exporter.compress.method import MatrixMethod
from exporter.compress.methods.entropy_constrained_int8 import (
    DEFAULT_BITS,
    entropy_constrained_methods,
    in_even_columns,
)
from exporter.formats.group import Decision
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.planning.step import CodedBits, CodedStep, Draft, EncodingTask
from exporter.targets.contract import low_rank

# A weight beside factors; fewer are not worth a code.
LEAST_BITS = 1.0


class EntropyConstrainedInt8Step(CodedStep):
    """Options of the step: those of every step for coding, and of factors.

    Attributes:
        rank: Of L R beside the matrices of the layers; None for no factors.
        factor_bits: Of a weight of L and R, within `bits`.
    """

    method: Literal["entropy-constrained-int8"]
    bits: CodedBits = DEFAULT_BITS
    rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    factor_bits: Literal[4, 8, 16] = 4

    @property
    def alternation(self) -> Alternation:
        """Factors come first: what they take of a matrix, its codes need not tell."""
        return Alternation(("LR", "Q"))

    def draft(self, task: EncodingTask) -> Draft:
        """Return the target's 8 bits for every matrix, and the factors."""
        draft = super().draft(task)
        if self.rank is None:
            return draft
        decisions = with_factors(draft.decisions, low_rank(task.target, self.rank, self.factor_bits))
        if self._left(decisions) < LEAST_BITS:
            raise RequestError(
                "the factors leave the matrices too few bits",
                got=f"{self._left(decisions):.2f} of {self.bits:g} beside factors of rank {self.rank}",
                expected=f"{LEAST_BITS} or more",
                next_step="choose a smaller rank or more bits",
            )
        return Draft(decisions)

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
        return dict(
            entropy_constrained_methods(given.model, given.statistics, groups, self._left(decisions), progress, ranks)
        )


STEP = EntropyConstrainedInt8Step
