"""Predicts the loss on the evaluation text of codes that were fitted to the calibration text.

The quadratic form of `exporter.calibrate.statistics` weighs an error by the inputs and sensitivities of one text, which
are others for source code than for prose. Codes are predicted as fitted to the calibration text; the cost of their
errors is counted on the evaluation text. The float model runs on it, never the artifact.
"""

import hashlib
from dataclasses import dataclass

from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.formats.format import Float32


@dataclass(frozen=True)
class _EvaluationSite(Site):
    """A site whose `fitted` is of the calibration text and whose `held`, which errors count by, of the evaluation text.

    Attributes:
        shrunk_by: How much of the correlations codes give up.
    """

    shrunk_by: float

    @property
    def fitted_shrinkage(self) -> float:
        """How much of the correlations in `fitted` to give up."""
        return self.shrunk_by


class EvaluationStatistics(Statistics):
    """Statistics to predict with; both are in the coordinates that the model is encoded in.

    Args:
        fitted: Of the calibration text, which codes are fitted to.
        evaluated: Of the evaluation text, which errors count on.
    """

    def __init__(self, fitted: Statistics, evaluated: Statistics) -> None:
        self._fitted, self._evaluated = fitted, evaluated
        self._last = None

    @property
    def key(self) -> str:
        """What they are of: a digest of both."""
        return hashlib.sha256(f"{self._fitted.key}:{self._evaluated.key}".encode()).hexdigest()

    def read_site(self, name: str) -> Site | None:
        """Return what the texts show of a site; None where nothing was observed."""
        fitted = self._fitted.read_site(name)
        if fitted is None:
            return None
        moment, squares, shrinkage = fitted.second_moment, fitted.squares, fitted.shrinkage
        # A site has three squares as wide as its inputs: not those of both texts at once.
        del fitted
        evaluated = self._evaluated.read_site(name)
        return evaluated and _EvaluationSite(moment, evaluated.second_moment, 1.0, squares, evaluated.peaks, shrinkage)

    def power(self, site: str) -> Float32 | None:
        """Return E[x^2] on the other text, tokens counting by their weights, float32 [columns]."""
        return self._evaluated.power(site)

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] on the text that codes are fitted to, float32 [columns]."""
        return self._fitted.importance(site)

    def sensitivity(self, layer: int | None, role: str) -> Float32:
        """Return E[g^2] of each output on the other text, float32 [rows]."""
        return self._evaluated.sensitivity(layer, role)

    def lookups(self) -> tuple[Float32, Float32]:
        """Return how the other text looks tokens up; see `Statistics.lookups`."""
        return self._evaluated.lookups()

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges on the text that codes and scales are fitted to."""
        return self._fitted.ranges(place)
