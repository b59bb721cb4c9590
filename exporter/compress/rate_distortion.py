"""One step common to many matrices, found for the bits that their codes take together when coded.

What a step of a row costs in behaviour grows with the row's sensitivity and with what its inputs deviate; a row's own
step is the common one over the root of both. All rows then lose as much for their last bit, which is the least loss at
a total of bits, and how many bits a matrix gets follows from how much it matters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.statistics import Statistics
from exporter.coding.streams import coded_bits
from exporter.compress.method import spread_rows
from exporter.formats.format import Float32
from exporter.formats.group import WeightGroup
from exporter.formats.row_scaled import LARGEST_CODE
from exporter.foundation.errors import RequestError

Float64 = NDArray[np.float64]
Int8 = NDArray[np.int8]
Made = TypeVar("Made")
# Rows that hardly matter count at least so much of the mean.
LEAST_SENSITIVITY = 1e-3
# Of a matrix so many rows are tried, or this share of them where that is more.
SAMPLED_ROWS, SAMPLED_SHARE = 96, 1 / 64
# Codes that leave room for what feedback adds to the largest weight of a row.
ROOM = np.float32(LARGEST_CODE - 7)
# Rates by the formula for many bits, at the steps that true rates are measured at.
FINE_STEP_RATES = np.array([9.0, 7.5, 6.0, 5.0, 4.25, 3.5, 2.75, 2.0, 1.25, 0.5, -0.5, -2.0])
# A normal distribution of deviation s takes log2(s / step) + this many bits where steps are fine.
NORMAL_BITS = np.log2(2 * np.pi * np.e) / 2
HALVINGS = 40
# The scale of a row takes so many bits.
SCALE_BITS = 16


def roots_of(statistics: Statistics, group: WeightGroup, variance: float) -> Float32:
    """Return what the common step is divided by in each row of a matrix, float32 [rows].

    A row counts as an output by its sensitivity, and as what is looked up by how often that is.

    Args:
        statistics: Of the model.
        group: The matrix.
        variance: Of the inputs, as far as a row's error depends on it; not used where none are observed.
    """
    squares = np.zeros(group.rows, np.float32)
    if group.site != "tokens":
        role = "head" if group.layer is None else group.role
        squares += np.float32(variance) * statistics.sensitivity(group.layer, role)
    if "embedding" in group.uses:
        frequencies, columns = statistics.lookups()
        squares += frequencies * columns.mean()
    roots: Float32 = np.sqrt(squares + LEAST_SENSITIVITY * squares.mean() + np.float32(1e-30))
    return roots


def row_steps(weight: Float32, roots: Float32, step: float) -> Float32:
    """Return the step of each row, float32 [rows]: none so fine that a weight is beyond the largest code."""
    least = np.abs(weight).max(axis=1) / ROOM
    steps: Float32 = np.maximum(np.float32(step) / roots, least)
    return steps


@dataclass(frozen=True)
class Curve:
    """Bits a weight of a matrix, falling, at common steps, rising, as logarithms to base 2; each float64 [points]."""

    steps: Float64
    rates: Float64

    @classmethod
    def of(cls, weight: Float32, roots: Float32, rounded: Callable[[float], Int8], times: float = 1.0) -> "Curve":
        """Find out what codes take at some steps, tables and scales included.

        Args:
            weight: The matrix or some of its rows, float32 [rows, columns].
            roots: What the common step is divided by in each row, float32 [rows].
            rounded: Gives the codes, int8 [rows, columns], at a common step.
            times: How many times as many rows the matrix has.
        """
        spread = np.sqrt(np.mean(weight**2, axis=1, dtype=np.float64)) * roots
        steps = np.mean(np.log2(np.maximum(spread, 1e-30))) + NORMAL_BITS - FINE_STEP_RATES
        rates = [coded_bits(rounded(2.0**step).view(np.uint8), times) / (weight.size * times) for step in steps]
        return cls(steps, np.minimum.accumulate(rates) + SCALE_BITS / weight.shape[1])

    def at(self, step: float) -> float:
        """Return the bits a weight at the logarithm of a common step."""
        return float(np.interp(step, self.steps, self.rates))


def common_step(curves: Sequence[Curve], sizes: Sequence[int], bits: float) -> float:
    """Return the logarithm of the step at which matrices of these sizes take so many bits a weight together.

    Raises:
        RequestError: there is none.
    """

    def rate(step: float) -> float:
        return float(np.average([curve.at(step) for curve in curves], weights=sizes))

    low, high = min(float(curve.steps[0]) for curve in curves), max(float(curve.steps[-1]) for curve in curves)
    if not rate(high) <= bits <= rate(low):
        raise RequestError(
            "no step gives this rate",
            got=f"{bits:g} bits a weight",
            expected=f"from {rate(high):.2f} to {rate(low):.2f}",
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > bits else (low, middle)
    return high


def at_common_step(
    groups: Sequence[WeightGroup],
    bits: float,
    sampled: Callable[[WeightGroup], tuple[Curve, Callable[[float, float], Made]]],
    progress: Callable[[int, int], None],
) -> dict[str, Made]:
    """Return what is made of each matrix, by name, at the step at which all take so many bits a weight together.

    Args:
        groups: The matrices.
        bits: Bits a weight on average, tables and scales included.
        sampled: Gives the curve of a matrix, and what is to be made of it from its own bits a weight and the step.
        progress: Called with matrices done and their total.

    Raises:
        RequestError: no common step gives this rate.
    """
    found = []
    for number, group in enumerate(groups):
        progress(number, len(groups))
        found.append(sampled(group))
    progress(len(groups), len(groups))
    step = common_step([curve for curve, _ in found], [group.size for group in groups], bits)
    return {group.name: make(curve.at(step), 2.0**step) for group, (curve, make) in zip(groups, found, strict=True)}


def some_rows(rows: int) -> NDArray[np.int64]:
    """Return rows that are tried for a matrix of so many."""
    return spread_rows(rows, max(SAMPLED_ROWS, int(SAMPLED_SHARE * rows)))
