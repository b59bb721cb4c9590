"""What a step of a recipe is."""

from abc import abstractmethod

from exporter.compress.caldera import TURNS, Turns
from exporter.measures import Document
from exporter.model.model import Model
from exporter.targets.target import Target
from exporter.weights.group import Decision


class EncodingStep(Document):
    """A step that gives every matrix its format, and its factors if it has any: the last of a recipe.

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
