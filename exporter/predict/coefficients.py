"""The coefficients of predicted speeds, as fitted to published speeds of real devices, and how far they are off.

`python -m tests.benchmarks.fitting` fits them anew and writes the file.
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
# Of a processor that no row was about.
UNKNOWN = "other"


class Coefficients(Document):
    """What one kind of time is made of.

    Attributes:
        values: Name to logarithm; a name that is missing counts nothing.
        spread: Kind of processor, and machine that it is part of, to the standard deviation of a device's logarithm of
            time from what is predicted; `other` for those that no row is about.
        family_spread: How much further apart two formats' errors on one device are.
        size_spread: How much further apart two sizes' errors are, for each factor of e.
        noise: Of one published run.
    """

    values: Mapping[str, float]
    spread: Mapping[str, float]
    family_spread: float
    size_spread: float
    noise: float

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
    """Return the coefficients that come with the exporter."""
    return read_document(files(__package__) / FILE, Fitted, "file of coefficients")
