"""The step `prune-closed-form`: feed-forward channels go that cost least, and `down` is repaired for their loss.

See `exporter.compress.prune`.
"""

from typing import Literal

from exporter.calibrate.layer_stream import Progress
from exporter.compress.prune import ClosedFormOptions, prune, uneven_widths
from exporter.model.model import Model
from exporter.planning.step import Observe, PruningStep, Work, repair_work


class ClosedForm(PruningStep):
    """Options of the step.

    Attributes:
        sizes: `per-layer`: layers that can spare more lose more; `equal`: all lose alike.
    """

    method: Literal["prune-closed-form"]
    sizes: Literal["per-layer", "equal"] = "per-layer"

    def widths(self, model: Model) -> tuple[int, ...]:
        """Return how many channels each layer keeps; as uneven as they may get where the text decides."""
        even = super().widths(model)
        return even if self.sizes == "equal" else uneven_widths(even, model.decoder, self.multiple)

    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Choose channels by what they cost on the calibration text, and repair."""
        options = ClosedFormOptions(self.ratio, self.multiple, self.sizes == "equal")
        return prune(model, observe(model), options, progress).model

    def work(self, model: Model) -> Work:
        """Count an inverse for each layer, and what it takes to keep it as channels go."""
        shape = model.decoder
        repairing = repair_work(shape)
        operations = sum(2 * width**3 * (1 + self.ratio) for width in shape.intermediate)
        return Work(operations + repairing.operations, repairing.peak_bytes, True)


STEP = ClosedForm
