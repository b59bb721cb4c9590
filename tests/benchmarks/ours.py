"""What the exporter makes within limits; the one place here that knows how it is asked."""

from dataclasses import dataclass
from pathlib import Path

from exporter.calibrate.evaluation_statistics import EvaluationStatistics
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.allocate import Choice, Limits, Storage, predicted_choices
from exporter.compress.compression import Compression, propagation_text
from exporter.compress.effort import effort
from exporter.compress.method import load_method
from exporter.formats.group import Decision
from exporter.model.decoder import EMBEDDING
from exporter.model.model import Model
from exporter.planning.budget import Budget, chosen, stock_of_that_size
from exporter.predict.roofline import Cpu
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower

SEED = 0
# Two cores of a server with AVX-512 VNNI. Choices are held to what the stock tool makes, so its kernels decide; they
# are those of the machine that runs this.
HOST = Cpu(bytes_per_s=45e9, products_per_s=208e9)


@dataclass(frozen=True)
class Ours:
    """An artifact under a budget.

    Attributes:
        artifact: The files.
        predicted: Mean KL that was predicted for the evaluation text, nats a token.
    """

    artifact: Artifact
    predicted: float


class Exporter:
    """The exporter for one model, target and calibration text: what every format costs is found out once.

    Args:
        model: The model.
        target: A target's name.
        calibration: The calibration text.
        evaluation: The text to predict for.
        effort_name: How much work goes into it.
    """

    def __init__(
        self, model: Model, target: str, calibration: Windows, evaluation: Windows, effort_name: str = "balanced"
    ) -> None:
        self._model, self._calibration = model, calibration
        self._target = load_target(target)
        self._effort = effort(effort_name)
        statistics = collect(model, calibration, SEED, silent)
        usual = self._target.decide(model, self._target.default_type, self._target.default_method)
        self._rewritten = self._target.rewritten(model, statistics, usual)
        self._storages = self._target.storages(model)
        self._method = load_method(self._target.default_method, self._effort)
        self._choices = predicted_choices(
            self._rewritten.model, self._storages, self._method, self._rewritten.statistics, silent
        )
        seen = collect(model, evaluation.spread(self._effort.prediction_windows), SEED, silent)
        self._on_evaluation = EvaluationStatistics(self._rewritten.statistics, self._rewritten.of(seen))

    def made(self, max_file_bytes: int, folder: Path, embedding: str | None = None, prefer: str = "balanced") -> Ours:
        """Make an artifact of no more bytes; `embedding` names the only format that the embedding may have."""
        fixed = self._target.fixed_bytes(self._model)
        limits = Limits(bytes=max_file_bytes - fixed)
        stock = stock_of_that_size(self._target, self._model, max_file_bytes - fixed)
        budget = Budget(limits, fixed, self._storages, prefer, self._target, HOST, stock)
        choices = [
            [budget.timed(storage, choice) for choice in _allowed(storage, some, embedding)]
            for storage, some in zip(self._storages, self._choices, strict=True)
        ]
        made = self._lowered(chosen(budget, choices), folder)
        assert made.artifact.file_bytes <= max_file_bytes
        return made

    def alike(self, name: str, embedding: str, folder: Path) -> Ours:
        """Make an artifact whose embedding has one format and all other matrices another."""
        every = [_allowed(*pair, embedding, name) for pair in zip(self._storages, self._choices, strict=True)]
        return self._lowered([choice for (choice,) in every], folder)

    def _lowered(self, best: list[Choice], folder: Path) -> Ours:
        decisions = {
            group.name: Decision(group, self._target.default_method, choice.format, "allocated")
            for storage, choice in zip(self._storages, best, strict=True)
            for group in storage.groups
        }
        ordered = [decisions[group.name] for group in self._model.groups()]
        folder.mkdir()
        compression = Compression(
            self._rewritten.model,
            ordered,
            self._rewritten.statistics,
            self._effort,
            source=self._model,
            propagation_text=propagation_text(self._effort, ordered, self._calibration),
        )
        artifact = lower(self._target, compression, "allocated", folder).artifact
        taken = [Storage.of(one) for one in ordered]
        predicted = predicted_choices(self._rewritten.model, taken, self._method, self._on_evaluation, silent)
        return Ours(artifact, sum(choice.kl for (choice,) in predicted))


def silent(done: int, total: int) -> None:
    """Show no progress."""


def _allowed(storage: Storage, choices: list[Choice], embedding: str | None, rest: str | None = None) -> list[Choice]:
    """Return the choices left where the embedding, or every other matrix, must have the format of that name."""
    name = embedding if any(group.name == EMBEDDING for group in storage.groups) else rest
    return [choice for choice in choices if name in (None, choice.format.name)]
