"""What the exporter makes under a budget of bytes; the one place here that knows how it is asked."""

from dataclasses import dataclass
from pathlib import Path

from exporter.calibrate.statistics import collect
from exporter.calibrate.text import Windows
from exporter.compress.allocate import Choice, Storage, allocate, predict
from exporter.compress.compressed import CompressedModel
from exporter.compress.method import load_method
from exporter.effort import effort
from exporter.model.families import EMBEDDING
from exporter.model.model import Model
from exporter.targets.artifact import Artifact
from exporter.targets.target import load_target
from exporter.weights.group import Decision

SEED = 0


@dataclass(frozen=True)
class Ours:
    """An artifact under a budget.

    Attributes:
        artifact: The files.
        predicted: Mean KL that was predicted, nats a token.
    """

    artifact: Artifact
    predicted: float


class Exporter:
    """The exporter for one model, target and calibration text: what every format costs is found out once.

    Args:
        model: The model.
        target: A target's name.
        calibration: The calibration text.
        effort_name: How much work goes into it.
    """

    def __init__(self, model: Model, target: str, calibration: Windows, effort_name: str = "balanced") -> None:
        self._model = model
        self._target = load_target(target)
        self._effort = effort(effort_name)
        self._statistics = collect(model, calibration, SEED, lambda done, total: None)
        self._storages = self._target.storages(model)
        method = load_method(self._target.default_method, self._effort)
        self._choices = predict(model, self._storages, method, self._statistics, lambda done, total: None)

    def made(self, max_file_bytes: int, folder: Path, embedding: str | None = None) -> Ours:
        """Make an artifact of no more bytes; `embedding` names the only format that the embedding may have."""
        choices = [_allowed(*pair, embedding) for pair in zip(self._storages, self._choices, strict=True)]
        chosen = allocate(choices, max_file_bytes, self._target.fixed_bytes(self._model))
        made = self._lowered(chosen, folder)
        assert made.artifact.file_bytes <= max_file_bytes
        return made

    def alike(self, name: str, embedding: str, folder: Path) -> Ours:
        """Make an artifact whose embedding has one format and all other matrices another."""
        every = [_allowed(*pair, embedding, name) for pair in zip(self._storages, self._choices, strict=True)]
        return self._lowered([choice for (choice,) in every], folder)

    def _lowered(self, chosen: list[Choice], folder: Path) -> Ours:
        decisions = {
            group.name: Decision(group, self._target.default_method, choice.format, "allocated")
            for storage, choice in zip(self._storages, chosen, strict=True)
            for group in storage.groups
        }
        ordered = [decisions[group.name] for group in self._model.groups()]
        folder.mkdir()
        compressed = CompressedModel(self._model, ordered, self._statistics, self._effort)
        artifact = self._target.lower(compressed, "allocated", folder)
        return Ours(artifact, sum(choice.kl for choice in chosen))


def _allowed(storage: Storage, choices: list[Choice], embedding: str | None, rest: str | None = None) -> list[Choice]:
    """Return the choices left where the embedding, or every other matrix, must have the format of that name."""
    name = embedding if any(group.name == EMBEDDING for group in storage.groups) else rest
    return [choice for choice in choices if name in (None, choice.format.name)]
