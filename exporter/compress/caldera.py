"""CALDERA in the formats of runtimes: W = Q + L R (Saha et al. 2024, NeurIPS, algorithm 1).

Q and L R alternate as in `exporter.compress.reference.caldera`, with a method of this package in place of the lattice.
It encodes Q and R in the metric of the inputs, and L in the metric of R's outputs. Rows are weighted by their
sensitivities, as in the model's divergence (`exporter.calibrate.statistics`). This does not change Q, whose rows are
independent of each other.
"""

from copy import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.calibrate.second_moments import Site
from exporter.compress.lowrank import (
    balanced_components,
    downdated,
    fitted_left,
    fitted_right,
    largest_channels,
    regression,
    regression_on,
    weighted_error,
)
from exporter.compress.method import Method
from exporter.compress.methods.ldlq import DAMPING, damped
from exporter.formats.format import EncodedFactors, EncodedMatrix, Float32, LowRank, WeightFormat

Part = Literal["Q", "LR"]
# Smallest weight of a row, as a share of the mean.
LEAST_SENSITIVITY = 1e-3


@dataclass(frozen=True)
class Alternation:
    """How Q and L R alternate.

    Attributes:
        order: The order of the two updates.
        iterations: How often each is fitted.
        factor_iterations: How often R is fitted to the rounded L again, within an iteration.
        outliers: Number of columns, those of the largest inputs, that initialise L R (Cho et al. 2025, ODLRI); at most
            the rank.
        downdate: Exclude from Q's loss the directions that L R can represent.
    """

    order: tuple[Part, Part] = ("Q", "LR")
    iterations: int = 2
    factor_iterations: int = 1
    outliers: int = 0
    downdate: bool = False


ALTERNATION = Alternation()


def encode_with_factors(
    weight: Float32,
    format: WeightFormat,
    low_rank: LowRank,
    site: Site,
    outputs: Float32,
    method: Method,
    alternation: Alternation = ALTERNATION,
    factor_method: Method | None = None,
) -> EncodedMatrix:
    """Encode one matrix and its factors; the best of all iterates is kept.

    Args:
        weight: W, float32 [rows, columns]; not changed.
        format: Format of Q.
        low_rank: Rank and format of L and R.
        site: Statistics of the inputs.
        outputs: Sensitivity of each row, float32 [rows].
        method: Chooses the codes of Q.
        alternation: Order and number of the updates.
        factor_method: Chooses the codes of L and R; None for the same method.
    """
    problem = _Problem(weight, site, outputs, low_rank, method, factor_method or method)
    factors = problem.on_outliers(alternation.outliers) if alternation.outliers else None
    base, best, least = None, None, np.inf
    for part in alternation.order * alternation.iterations:
        if part == "Q":
            base = problem.base(format, factors, alternation.downdate)
        else:
            factors = problem.factors(weight if base is None else weight - base.planned, alternation.factor_iterations)
        if base is None or factors is None:
            continue
        planned = factors.added_to(base.planned)
        error = problem.error(planned - weight)
        if best is None or error < least:
            best, least = EncodedMatrix(base.data, planned, factors), error
    assert best is not None
    return best


class _Problem:
    """One matrix to be encoded with factors; the arguments are those of `encode_with_factors`."""

    def __init__(
        self,
        weight: Float32,
        site: Site,
        outputs: Float32,
        low_rank: LowRank,
        method: Method,
        factor_method: Method,
    ) -> None:
        self._weight, self._site, self._low_rank, self._method = weight, site, low_rank, method
        # A method may cache its work on the last site, and L has other sites than Q and R.
        self._method_of_right, self._method_of_left = factor_method, copy(factor_method)
        self._moment = damped(site.second_moment, DAMPING, site.shrinkage)
        self._rows = _scales(outputs)

    def error(self, change: Float32) -> float:
        """Return the weighted squared error of the outputs under a change of W."""
        return weighted_error(change * self._rows, self._moment)

    def base(self, format: WeightFormat, factors: EncodedFactors | None, downdate: bool) -> EncodedMatrix:
        """Return Q for the residual of the factors."""
        if factors is None:
            return self._method.encode(self._weight, format, self._site)
        residual = self._weight - factors.added_to(np.zeros_like(self._weight))
        return self._method.encode(residual, format, self._without(factors) if downdate else self._site)

    def _without(self, factors: EncodedFactors) -> Site:
        """Return the site without the directions that R spans."""
        right = factors.low_rank.format.decode_rows(factors.right, self._weight.shape[1])
        return _site(damped(downdated(self._moment, right), DAMPING))

    def factors(self, target: Float32, iterations: int) -> EncodedFactors:
        """Return factors for W - Q."""
        scaled = target * self._rows
        best = self._encoded(target, regression(scaled, self._moment, self._low_rank.rank)[1])
        least = self.error(best.added_to(-target))
        for _ in range(iterations):
            left = best.low_rank.format.decode_rows(best.left, self._low_rank.rank)
            again = self._encoded(target, fitted_right(scaled, left * self._rows))
            error = self.error(again.added_to(-target))
            if error < least:
                best, least = again, error
        return best

    def on_outliers(self, count: int) -> EncodedFactors:
        """Return factors that represent W on the columns of the largest inputs."""
        columns = largest_channels(self._moment, min(count, self._low_rank.rank))
        right = regression_on(columns, self._weight * self._rows, self._moment, self._low_rank.rank)[1]
        only = np.zeros_like(self._weight)
        only[:, columns] = self._weight[:, columns]
        return self._encoded(only, right)

    def _encoded(self, target: Float32, right: Float32) -> EncodedFactors:
        """Encode R with balanced components, then the L that fits the encoded R best."""
        format = self._low_rank.format
        encoded = self._method_of_right.encode(balanced_components(right, self._moment), format, self._site)
        left = fitted_left(target, self._moment, encoded.planned)
        image: Float32 = encoded.planned @ self._moment
        moment: Float32 = image @ encoded.planned.T
        seen = _site(moment)
        return EncodedFactors(self._low_rank, self._method_of_left.encode(left, format, seen).data, encoded.data)


def _site(moment: Float32) -> Site:
    """Return a site of which only the second moment is known."""
    return Site(moment, moment, 0.0, np.ascontiguousarray(moment.diagonal()), {})


def residual(weight: Float32, rank: int, site: Site, outputs: Float32) -> Float32:
    """Return the residual of a matrix after factors in full precision, float32 [rows, columns]; Q has to represent it.

    Its encoding error predicts that of Q and L R together, so that a rank can compete with bits for the same bytes. The
    prediction is exact if the factors are fitted first, and close if the matrix is.

    Args:
        weight: W, float32 [rows, columns]; not changed.
        rank: Rank of L R.
        site: Statistics of the inputs.
        outputs: Sensitivity of each row, float32 [rows].
    """
    rows = _scales(outputs)
    left, right = regression(weight * rows, damped(site.fitted, DAMPING, site.fitted_shrinkage), rank)
    scaled: Float32 = left / rows
    best: Float32 = scaled @ right
    rest: Float32 = weight - best
    return rest


def _scales(outputs: Float32) -> Float32:
    """Return factors of the rows that make their squares count by sensitivity, float32 [rows, 1]."""
    mean = float(outputs.mean(dtype=np.float64)) or 1.0
    scales: Float32 = np.sqrt(np.maximum(outputs / np.float32(mean), np.float32(LEAST_SENSITIVITY)))[:, None]
    return scales
