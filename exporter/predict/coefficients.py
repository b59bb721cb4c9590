"""The coefficients of predicted speeds, fitted to published speeds of real devices, and their errors.

`python -m tests.benchmarks.fitting` refits them and writes the file.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from math import exp, log
from typing import Literal

from exporter.foundation.config_files import read_document
from exporter.foundation.quantities import Document
from exporter.predict.token_cost import Term

FILE = "coefficients.toml"
Part = Literal["decode", "prefill"]
# Key for processors without published rows.
UNKNOWN = "other"


class Coefficients(Document):
    """The fitted model of one kind of time.

    Attributes:
        values: Name -> logarithmic coefficient; missing names count as 0.
        spread: Kind of processor and machine -> standard deviation of a device's error in log time; `other` for kinds
            without published rows.
        family_spread: Additional standard deviation between two format families on one device.
        program_spread: Additional standard deviation between two programs on one device.
        size_spread: Additional standard deviation per factor of e in size.
        noise: Kind of processor -> standard deviation of one run beside all that; `other` for the other kinds.
    """

    values: Mapping[str, float]
    spread: Mapping[str, float]
    family_spread: float
    program_spread: float
    size_spread: float
    noise: Mapping[str, float]

    def noise_of(self, kind: str) -> float:
        """Return the standard deviation of one run on a kind of processor."""
        return self.noise.get(kind, self.noise[UNKNOWN])

    def log_milliseconds(self, terms: Sequence[Term]) -> float:
        """Return the logarithm of the sum of terms."""
        return log(sum(term.milliseconds * exp(self._power(term)) for term in terms))

    def _power(self, term: Term) -> float:
        return sum(weight * self.values.get(name, 0.0) for name, weight in term.weights.items())


class Fitted(Document):
    """The coefficients of both kinds of time."""

    decode: Coefficients
    prefill: Coefficients


@cache
def fitted() -> Fitted:
    """Return the bundled coefficients."""
    return read_document(files(__package__) / FILE, Fitted, "file of coefficients")
