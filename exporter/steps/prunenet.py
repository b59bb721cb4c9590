"""The step `prunenet`: feed-forward channels that a learned policy takes away, without any text.

The published system (Sengupta et al. 2025); see `exporter.compress.prunenet`.
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from exporter.calibrate.layers import Progress
from exporter.compress import prunenet
from exporter.compress.prune import repair
from exporter.model.model import Model
from exporter.steps.step import Observe, PruningStep, Work, repair_work

# Multiplications and additions for the eigenvalues of a matrix, over the cube of its width.
EIGENVALUES = 4


class PruneNet(PruningStep):
    """Options of the step.

    Attributes:
        learned_at: Share of rows that go while the policy is learned; None for `ratio`: a policy serves any other.
        episodes: How often it goes over all layers while it learns.
        seed: Of all that is drawn.
        published: Keep the last policy and draw the mask once more, as the published code does.
        repair: Fit `down` to what all channels put out, on the calibration text; the published system does not.
    """

    method: Literal["prunenet"]
    learned_at: Annotated[float, Field(gt=0, lt=1)] | None = None
    episodes: Annotated[int, Field(ge=1, le=1000)] = 20
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    published: bool = False
    repair: bool = False

    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Learn a policy, unless the cache holds it, and keep the channels that it chooses."""
        policy = prunenet.learned(model, self._options(), progress)
        if self.repair:
            return repair(model, observe(model), policy.kept(model, self.widths(model))).model
        return prunenet.prune(model, policy, self.ratio, self.multiple).model

    def _options(self) -> prunenet.Options:
        options = prunenet.PUBLISHED if self.published else prunenet.Options()
        ratio = self.ratio if self.learned_at is None else self.learned_at
        return replace(options, ratio=ratio, episodes=self.episodes, seed=self.seed)

    def work(self, model: Model) -> Work:
        """Count the singular values of every layer's rows in every episode; all gate matrices are in memory."""
        shape = model.architecture
        operations = self.episodes * sum(
            2 * width * shape.hidden**2 + EIGENVALUES * shape.hidden**3 for width in shape.intermediate
        )
        held = 4 * shape.hidden * sum(shape.intermediate) + 2 * 8 * shape.hidden * max(shape.intermediate)
        if not self.repair:
            return Work(operations, held, False)
        repairing = repair_work(shape)
        return Work(operations + repairing.operations, max(held, repairing.peak_bytes), True)


STEP = PruneNet
