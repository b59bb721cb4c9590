"""Numbers that are predicted: a value, an interval that holds 80 % of the outcomes, and how both are known."""

from math import exp

from exporter.foundation.quantities import Basis, Document

# A normal variable is within so many standard deviations 80 times of 100.
EIGHTY_PERCENT = 1.2816


class Estimate(Document):
    """A predicted number.

    Attributes:
        value: The most likely.
        low: Lower end of the interval of 80 %.
        high: Upper end.
        unit: Of all three.
        basis: How they are known.
        how: What they follow from, in a few words.
    """

    value: float
    low: float
    high: float
    unit: str
    basis: Basis = "estimated"
    how: str


def lognormal(log_value: float, deviation: float, unit: str, how: str) -> Estimate:
    """Return a number whose logarithm is expected at `log_value`, with a standard deviation."""
    reach = EIGHTY_PERCENT * deviation
    low, value, high = (exp(log_value + step) for step in (-reach, 0.0, reach))
    return Estimate(value=value, low=low, high=high, unit=unit, how=how)
