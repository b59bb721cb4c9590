"""The step `named-type`: every matrix gets the format that a named mix of the target gives it."""

from typing import Annotated, Literal, Self

from pydantic import Field

from exporter.planning.step import Draft, EncodingStep, EncodingTask
from exporter.targets.contract import Target

Name = Annotated[str, Field(min_length=1, max_length=64)]


class NamedType(EncodingStep):
    """Options of the step.

    Attributes:
        type: A named mix or format of the target, such as `Q4_K_M` or `int4`; None for the target's default.
        codes: The method that chooses codes, `ldlq` or `rtn`; None for the target's default.
    """

    method: Literal["named-type"]
    type: Name | None = None
    codes: Name | None = None

    @property
    def chooses_codes_by(self) -> str:
        """The method that chooses codes."""
        return self.codes or self.method

    def resolved(self, target: Target) -> Self:
        """Return the step with the target's default type and method where none are named."""
        chosen = {"type": self.type or target.default_type, "codes": self.codes or target.default_method}
        return self.model_copy(update=chosen)

    def draft(self, task: EncodingTask) -> Draft:
        """Return the target's own decisions for that type."""
        type, codes = self.type or task.target.default_type, self.codes or task.target.default_method
        return Draft(task.target.decide(task.model, type, codes), type)


STEP = NamedType
