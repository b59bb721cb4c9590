"""What is fitted to one text, as another text meets it: so that a prediction holds for the text that is measured on.

The quadratic form of `exporter.calibrate.statistics` counts an error by the inputs and sensitivities of one text, and
source code has others than prose. Codes are still foretold as they will be, fitted to the calibration text; only what
their errors cost is counted on the other one. It is the float model that is run on it, never the artifact.
"""

import hashlib
from dataclasses import dataclass

from exporter.calibrate.moments import Site
from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.statistics import Statistics
from exporter.weights.format import Float32


@dataclass(frozen=True)
class _MetSite(Site):
    """A site whose `fitted` is of the text that codes are fitted to and whose `held`, all that counts, of the other.

    Attributes:
        shrunk_by: How much of the correlations codes give up.
    """

    shrunk_by: float

    @property
    def fitted_shrinkage(self) -> float:
        """How much of the correlations in `fitted` to give up."""
        return self.shrunk_by


class MetElsewhere(Statistics):
    """Statistics to predict with; both are in the coordinates that the model is encoded in.

    Args:
        fitted: Of the text that codes are fitted to.
        met: Of the text that they are to do well on.
    """

    def __init__(self, fitted: Statistics, met: Statistics) -> None:
        self._fitted, self._met = fitted, met
        self._last = None

    @property
    def key(self) -> str:
        """What they are of: a digest of both."""
        return hashlib.sha256(f"{self._fitted.key}:{self._met.key}".encode()).hexdigest()

    def read_site(self, name: str) -> Site | None:
        """Return what the texts show of a site; None where nothing was observed."""
        fitted = self._fitted.read_site(name)
        if fitted is None:
            return None
        moment, squares, shrinkage = fitted.second_moment, fitted.squares, fitted.shrinkage
        # A site has three squares as wide as its inputs: not those of both texts at once.
        del fitted
        met = self._met.read_site(name)
        return met and _MetSite(moment, met.second_moment, 1.0, squares, met.peaks, shrinkage)

    def power(self, site: str) -> Float32 | None:
        """Return E[x^2] on the other text, tokens counting by their weights, float32 [columns]."""
        return self._met.power(site)

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] on the text that codes are fitted to, float32 [columns]."""
        return self._fitted.importance(site)

    def sensitivity(self, layer: int | None, role: str) -> Float32:
        """Return E[g^2] of each output on the other text, float32 [rows]."""
        return self._met.sensitivity(layer, role)

    def lookups(self) -> tuple[Float32, Float32]:
        """Return how the other text looks tokens up; see `Statistics.lookups`."""
        return self._met.lookups()

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges on the text that codes and scales are fitted to."""
        return self._fitted.ranges(place)
