"""The step `prunenet`: feed-forward channels that a learned policy takes away.

The published system (Sengupta et al. 2025); see `exporter.compress.prunenet`.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from exporter.calibrate.layer_stream import Progress
from exporter.compress import prunenet
from exporter.compress.prune import repair
from exporter.foundation.config_files import impossible, shown
from exporter.model.model import Model
from exporter.planning.step import Observe, PruningStep, Work, repair_work

# Multiplications and additions for the eigenvalues of a matrix, over the cube of its width.
EIGENVALUES = 4
MOST_DRAWS = 4096


class PruneNet(PruningStep):
    """Options of the step.

    Attributes:
        learned_at: Share of rows that go while the policy is learned; None for `ratio`: a policy serves any other.
        episodes: How often it goes over all layers while it learns.
        seed: Of all that is drawn.
        draws: Of so many masks of each layer that the policy draws, that which costs least on the calibration text is
            taken; 0: its deterministic one, without any text.
        published: Keep the last policy and draw one mask, as the published code does.
        repair: Fit `down` to what all channels put out, on the calibration text; the published system does not.
    """

    method: Literal["prunenet"]
    learned_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    episodes: Annotated[int, Field(ge=1, le=1000)] = 20
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    draws: Annotated[int, Field(ge=0, le=MOST_DRAWS)] = prunenet.DRAWS
    published: bool = False
    repair: bool = False

    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Learn a policy, unless the cache holds it, and keep the channels that it chooses."""
        policy = prunenet.learned(model, self._options(), progress)
        statistics = observe(model) if self._observes else None
        if statistics is not None and self.repair:
            kept = policy.kept(model, self.widths(model), statistics, self.draws)
            return repair(model, statistics, kept).model
        return prunenet.prune(model, policy, self.ratio, self.multiple, statistics, self.draws).model

    @model_validator(mode="before")
    @classmethod
    def _draws_once_as_published(cls, table: dict[str, Any]) -> dict[str, Any]:
        published = table.get("published") is True
        if published and table.get("draws", 0) != 0:
            raise impossible("the published form draws one mask", f"draws = {shown(table['draws'])}", "draws = 0")
        return {**table, "draws": 0} if published else table

    @property
    def _observes(self) -> bool:
        return self.repair or self.draws > 0

    def _options(self) -> prunenet.PruneNetOptions:
        options = prunenet.PUBLISHED if self.published else prunenet.PruneNetOptions()
        ratio = self.ratio if self.learned_at is None else self.learned_at
        return replace(options, ratio=ratio, episodes=self.episodes, seed=self.seed)

    def work(self, model: Model) -> Work:
        """Count the singular values of every layer's rows in every episode, and the choice; all gates are in memory."""
        shape = model.decoder
        operations: float = self.episodes * sum(
            2 * width * shape.hidden**2 + EIGENVALUES * shape.hidden**3 for width in shape.intermediate
        )
        held = 4 * shape.hidden * sum(shape.intermediate) + 2 * 8 * shape.hidden * max(shape.intermediate)
        if self.draws:
            operations += sum(2 * width**2 * (shape.hidden + self.draws) for width in shape.intermediate)
        repairing = repair_work(shape)
        if self._observes:
            held = max(held, repairing.peak_bytes)
        if self.repair:
            operations += repairing.operations
        return Work(operations, held, self._observes)


STEP = PruneNet
