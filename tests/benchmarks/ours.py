"""What the exporter makes under a budget of bytes; the one place here that knows how it is asked."""

import time
from dataclasses import dataclass
from pathlib import Path

from exporter.calibrate.sensitivity import collect_sensitivities
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.text import Windows
from exporter.compress.allocate import Choice, Storage, allocate, predict
from exporter.compress.compressed import CompressedModel
from exporter.model.families import EMBEDDING
from exporter.model.model import Model
from exporter.targets.artifact import Artifact
from exporter.targets.target import Target, load_target
from exporter.weights.group import Decision

SEED = 0


@dataclass(frozen=True)
class Ours:
    """An artifact under a budget.

    Attributes:
        artifact: The files.
        predicted: Mean KL that was predicted, nats a token.
        seconds: What making it took, a budget's share of the statistics not counted.
    """

    artifact: Artifact
    predicted: float
    seconds: float


class Exporter:
    """The exporter for one model, target and calibration text: what every format costs is found out once.

    Args:
        model: The model.
        target: A target's name.
        calibration: The calibration text.
    """

    def __init__(self, model: Model, target: str, calibration: Windows) -> None:
        started = time.perf_counter()
        self._model = model
        self._target: Target = load_target(target)
        self._statistics: Statistics = collect(model, calibration, lambda done, total: None)
        sensitivities = collect_sensitivities(model, calibration, SEED, lambda done, total: None)
        self._storages: list[Storage] = self._target.storages(model)
        self._choices: list[list[Choice]] = predict(
            model,
            self._storages,
            self._target.default_method,
            self._statistics,
            sensitivities,
            lambda done, total: None,
        )
        self.seconds = time.perf_counter() - started

    def made(self, max_file_bytes: int, folder: Path, embedding: str | None = None) -> Ours:
        """Make an artifact of no more bytes; `embedding` names the only format that the embedding may have."""
        started = time.perf_counter()
        choices = [self._allowed(*pair, embedding) for pair in zip(self._storages, self._choices, strict=True)]
        chosen = allocate(choices, max_file_bytes, self._target.fixed_bytes(self._model))
        decisions = [
            Decision(group, self._target.default_method, choice.format, "allocated")
            for storage, choice in zip(self._storages, chosen, strict=True)
            for group in storage.groups
        ]
        folder.mkdir()
        artifact = self._target.lower(CompressedModel(self._model, decisions, self._statistics), "allocated", folder)
        assert artifact.file_bytes <= max_file_bytes
        return Ours(artifact, sum(choice.kl for choice in chosen), time.perf_counter() - started)

    def _allowed(self, storage: Storage, choices: list[Choice], embedding: str | None) -> list[Choice]:
        if embedding is None or all(group.name != EMBEDDING for group in storage.groups):
            return choices
        return [choice for choice in choices if choice.format.name == embedding]
