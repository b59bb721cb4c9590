"""Predicts the loss on the evaluation text of codes that were fitted to the calibration text.

The quadratic form of `exporter.calibrate.statistics` weights an error by the inputs and sensitivities of one text,
which differ between source code and prose. Here the codes are fitted to the calibration text, and the cost of their
errors is computed on the evaluation text. Only the float model runs on the evaluation text, never the artifact.
"""

import hashlib
from dataclasses import dataclass

from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.formats.format import Float32


@dataclass(frozen=True)
class _EvaluationSite(Site):
    """A site with `fitted` from the calibration text and `held`, which weights errors, from the evaluation text.

    Attributes:
        shrunk_by: Shrinkage of the correlations for fitting codes.
    """

    shrunk_by: float

    @property
    def fitted_shrinkage(self) -> float:
        """Shrinkage of the correlations in `fitted`."""
        return self.shrunk_by


class EvaluationStatistics(Statistics):
    """Statistics for prediction; both are in the coordinates in which the model is encoded.

    Args:
        fitted: Statistics of the calibration text, to which codes are fitted.
        evaluated: Statistics of the evaluation text, which weight the errors.
    """

    def __init__(self, fitted: Statistics, evaluated: Statistics) -> None:
        self._fitted, self._evaluated = fitted, evaluated
        self._last = None

    @property
    def key(self) -> str:
        """A digest of the keys of both."""
        return hashlib.sha256(f"{self._fitted.key}:{self._evaluated.key}".encode()).hexdigest()

    def read_site(self, name: str) -> Site | None:
        """Return the statistics of a site; None if it was not observed."""
        fitted = self._fitted.read_site(name)
        if fitted is None:
            return None
        moment, squares, shrinkage = fitted.second_moment, fitted.squares, fitted.shrinkage
        # A site holds three square matrices as wide as its inputs; do not keep those of both texts in memory.
        del fitted
        evaluated = self._evaluated.read_site(name)
        return evaluated and _EvaluationSite(moment, evaluated.second_moment, 1.0, squares, evaluated.peaks, shrinkage)

    def power(self, site: str) -> Float32 | None:
        """Return E[x^2] on the evaluation text, with tokens weighted, float32 [columns]."""
        return self._evaluated.power(site)

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] on the calibration text, float32 [columns]."""
        return self._fitted.importance(site)

    def sensitivity(self, layer: int | None, role: str) -> Float32:
        """Return E[g^2] of each output on the evaluation text, float32 [rows]."""
        return self._evaluated.sensitivity(layer, role)

    def lookups(self, table: str = "embedding") -> tuple[Float32, Float32]:
        """Return the token lookups of the evaluation text; see `Statistics.lookups`."""
        return self._evaluated.lookups(table)

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges on the calibration text, to which codes and scales are fitted."""
        return self._fitted.ranges(place)
