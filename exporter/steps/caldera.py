"""The step `caldera`: few bits for every matrix of the layers, and quantised low-rank factors beside them.

The published system (Saha et al. 2024) as runtimes hold it; see `exporter.compress.caldera`.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from exporter.compress.caldera import Alternation, Part
from exporter.compress.checks import with_factors
from exporter.formats.group import Decision
from exporter.foundation.config_files import impossible
from exporter.planning.step import Draft, EncodingStep, EncodingTask
from exporter.targets.contract import base_format, low_rank

Role = Literal["q", "k", "v", "o", "conv_in", "conv_out", "gate", "up", "down"]
CODES = "ldlq"


class Caldera(EncodingStep):
    """Options of the step.

    Attributes:
        bits: Of a weight of Q; None for the fewest that the target has at the model's widths.
        rank: Of L R.
        factor_bits: Of a weight of L and R.
        roles: Matrices that get factors.
        embedding_bits: Of embedding and head, which get none.
        iterations: How often each of Q and the factors is fitted.
        first: Which of them comes first. Factors of what Q has lost do better than factors of the whole matrix (0.033
            against 0.038 nats beside Q4_0, 0.74 against 0.76 beside 2 bits), and what they multiply rounds more finely.
        outliers: Columns of the largest inputs that the factors begin with (Cho et al. 2025, ODLRI).
        downdate: Exclude from Q's loss the directions that the factors can represent.
    """

    method: Literal["caldera"]
    bits: Annotated[int, Field(ge=1, le=8)] | None = None
    rank: Annotated[int, Field(ge=1, le=4096)] = 64
    factor_bits: Literal[4, 8, 16] = 4
    roles: tuple[Role, ...] = Field(default=get_args(Role), strict=False, min_length=1)
    embedding_bits: Annotated[int, Field(ge=1, le=8)] = 8
    iterations: Annotated[int, Field(ge=1, le=20)] = 2
    first: Literal["factors", "matrix"] = "matrix"
    outliers: Annotated[int, Field(ge=0, le=4096)] = 0
    downdate: bool = False

    @property
    def alternation(self) -> Alternation:
        """How matrices and their factors alternate."""
        order: tuple[Part, Part] = ("LR", "Q") if self.first == "factors" else ("Q", "LR")
        return Alternation(order, self.iterations, outliers=self.outliers, downdate=self.downdate)

    @model_validator(mode="after")
    def _keeps_its_outliers(self) -> Self:
        if self.outliers > self.rank:
            raise impossible("there are more outliers than ranks", self.outliers, f"at most {self.rank}")
        if self.outliers and self.first == "factors":
            raise impossible("factors that come first forget the outliers", 'first = "factors"', 'first = "matrix"')
        return self

    def draft(self, task: EncodingTask) -> Draft:
        """Return the formats of Q and of embedding and head, and the factors."""
        model, target = task.model, task.target
        factors = low_rank(target, self.rank, self.factor_bits)
        inner = {group.columns for group in model.groups() if group.layer is not None}
        outer = {group.columns for group in model.groups() if group.layer is None}
        matrix, table = base_format(target, self.bits, inner), base_format(target, self.embedding_bits, outer)
        decisions = [
            Decision(group, CODES, table if group.layer is None else matrix, f"{self.method} by the recipe")
            for group in model.groups()
        ]
        return Draft(with_factors(decisions, factors, self.roles))


STEP = Caldera
