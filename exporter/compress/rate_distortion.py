"""One step common to many matrices, chosen for their total of bits when coded.

The loss caused by a row's step grows with the row's sensitivity and with the variance of its inputs. A row's own step
is therefore the common one over the root of their product. All rows then lose as much for their last bit, which
minimises the loss at a total of bits. The bits of a matrix follow from how much it matters.
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
from exporter.model.decoder import TOKENS

Float64 = NDArray[np.float64]
Int8 = NDArray[np.int8]
Made = TypeVar("Made")
# Smallest weight of a row, as a share of the mean.
LEAST_SENSITIVITY = 1e-3
# Rows sampled from a matrix: this number, or this share if that is more.
SAMPLED_ROWS, SAMPLED_SHARE = 96, 1 / 64
# Largest code before feedback; it leaves room for the feedback that is added to the largest weight of a row.
ROOM = np.float32(LARGEST_CODE - 7)
# Rates by the formula for many bits; true rates are measured at their steps.
FINE_STEP_RATES = np.array([9.0, 7.5, 6.0, 5.0, 4.25, 3.5, 2.75, 2.0, 1.25, 0.5, -0.5, -2.0])
# A normal distribution of deviation s takes log2(s / step) + this many bits if steps are fine.
NORMAL_BITS = np.log2(2 * np.pi * np.e) / 2
HALVINGS = 40
# Bits of a row's scale.
SCALE_BITS = 16


def roots_of(statistics: Statistics, group: WeightGroup, variance: float) -> Float32:
    """Return the divisor of the common step in each row of a matrix, float32 [rows].

    A row counts as an output by its sensitivity, and as an embedding row by the frequency of its lookups.

    Args:
        statistics: Statistics of the model.
        group: The matrix.
        variance: Variance of the inputs, as far as a row's error depends on it; unused if none are observed.
    """
    squares = np.zeros(group.rows, np.float32)
    if group.site != TOKENS:
        part = "head" if group.layer is None else group.part
        squares += np.float32(variance) * statistics.sensitivity(group.layer, part)
    if "embedding" in group.uses:
        frequencies, columns = statistics.lookups(group.role)
        squares += frequencies[group.first_row :][: group.rows] * columns.mean()
    roots: Float32 = np.sqrt(squares + LEAST_SENSITIVITY * squares.mean() + np.float32(1e-30))
    return roots


def row_steps(weight: Float32, roots: Float32, step: float) -> Float32:
    """Return the step of each row, float32 [rows], coarse enough that no weight exceeds the largest code."""
    least = np.abs(weight).max(axis=1) / ROOM
    steps: Float32 = np.maximum(np.float32(step) / roots, least)
    return steps


@dataclass(frozen=True)
class Curve:
    """Bits per weight of a matrix, falling, at base-2 logarithms of common steps, rising; each float64 [points]."""

    steps: Float64
    rates: Float64

    @classmethod
    def of(cls, weight: Float32, roots: Float32, rounded: Callable[[float], Int8], times: float = 1.0) -> "Curve":
        """Measure the bits of the codes at some steps, including tables and scales.

        Args:
            weight: The matrix or some of its rows, float32 [rows, columns].
            roots: Divisor of the common step in each row, float32 [rows].
            rounded: Returns the codes, int8 [rows, columns], at a common step.
            times: Ratio of the matrix's rows to the given rows.
        """
        spread = np.sqrt(np.mean(weight**2, axis=1, dtype=np.float64)) * roots
        steps = np.mean(np.log2(np.maximum(spread, 1e-30))) + NORMAL_BITS - FINE_STEP_RATES
        rates = [coded_bits(rounded(2.0**step).view(np.uint8), times) / (weight.size * times) for step in steps]
        return cls(steps, np.minimum.accumulate(rates) + SCALE_BITS / weight.shape[1])

    def at(self, step: float) -> float:
        """Return the bits per weight at the logarithm of a common step."""
        return float(np.interp(step, self.steps, self.rates))


def common_step(curves: Sequence[Curve], sizes: Sequence[int], bits: float) -> float:
    """Return the logarithm of the step at which matrices of these sizes together take this many bits per weight.

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
    """Return the result for each matrix, by name, at the step at which all together take this many bits per weight.

    Args:
        groups: The matrices.
        bits: Average bits per weight, including tables and scales.
        sampled: Returns the curve of a matrix, and a function that makes its result from bits per weight and step.
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
    """Return the rows to sample from a matrix."""
    return spread_rows(rows, max(SAMPLED_ROWS, int(SAMPLED_SHARE * rows)))
