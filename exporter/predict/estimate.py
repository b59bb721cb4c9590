"""Predicted numbers: a value, its 80 % interval, and their basis."""

from math import exp

from exporter.foundation.quantities import Basis, Document

# 80 % of a normal distribution lies within this number of standard deviations.
EIGHTY_PERCENT = 1.2816


class Estimate(Document):
    """A predicted number.

    Attributes:
        value: The central value.
        low: Lower end of the 80 % interval.
        high: Upper end.
        unit: Unit of all three.
        basis: Their basis.
        how: Short description of their derivation.
    """

    value: float
    low: float
    high: float
    unit: str
    basis: Basis = "estimated"
    how: str


def lognormal(log_value: float, deviation: float, unit: str, how: str) -> Estimate:
    """Return a log-normal estimate with mean `log_value` and standard deviation `deviation` of its logarithm."""
    reach = EIGHTY_PERCENT * deviation
    low, value, high = (exp(log_value + step) for step in (-reach, 0.0, reach))
    return Estimate(value=value, low=low, high=high, unit=unit, how=how)
