"""A step: one type for the layers of even numbers, another for the rest."""

from typing import Literal

from exporter.planning.step import Draft, EncodingStep, EncodingTask


class EverySecond(EncodingStep):
    """Options of the step.

    Attributes:
        even: Type of the layers of even numbers.
        rest: Type of all else.
    """

    method: Literal["every-second"]
    even: str
    rest: str

    def draft(self, task: EncodingTask) -> Draft:
        even, rest = (task.target.decide(task.model, type, "rtn") for type in (self.even, self.rest))
        chosen = [
            one if one.group.layer is not None and one.group.layer % 2 == 0 else other
            for one, other in zip(even, rest, strict=True)
        ]
        return Draft(chosen, f"{self.even} and {self.rest} in turn")


STEP = EverySecond
