"""What a step of a recipe is."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

from exporter.calibrate.statistics import Statistics
from exporter.compress.caldera import TURNS, Turns
from exporter.compress.equalise import Rewritten
from exporter.compress.method import Method
from exporter.measures import Document
from exporter.model.model import Model
from exporter.targets.target import Target
from exporter.weights.group import Decision, WeightGroup


class EncodingStep(Document):
    """A step that gives every matrix its format, and its factors if it has any.

    Attributes:
        method: The step's name, that of its file.
    """

    method: str

    @property
    def turns(self) -> Turns:
        """How matrices and their factors take turns."""
        return TURNS

    @abstractmethod
    def decide(self, model: Model, target: Target) -> list[Decision]:
        """Return a decision for each weight group; reads no weights.

        Raises:
            RequestError: the target or the model cannot carry what the step asks for; what would work is named.
        """

    def coordinates(self, target: Target, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model in the coordinates that it is encoded in: by default those that suit the target."""
        return target.rewritten(model, statistics)

    def methods(
        self,
        groups: Sequence[WeightGroup],
        model: Model,
        statistics: Statistics,
        progress: Callable[[int, int], None],
    ) -> Mapping[str, Method]:
        """Return methods for matrices, by name, in place of the one that decisions name: by default none.

        Args:
            groups: All matrices.
            model: The model in the coordinates of `coordinates`.
            statistics: In the same coordinates.
            progress: Called with matrices done and their total.

        Raises:
            RequestError: what the step asks for cannot be had of these weights.
        """
        return {}
