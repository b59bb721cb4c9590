"""A rate of our choice in an 8-bit format: error feedback with steps chosen for the entropy of the codes.

The file is the runtime's own, 8 bits a weight; coded (`exporter.coding`) it takes what its codes' entropy is. With
D = E V the error of feedback (`exporter.compress.methods.ldlq`), a matrix costs sum_ij s_i d_j step_ij^2 / 24 in KL.
Here s_i is a row's sensitivity, and d_j = 1 / U_jj^2 the part of an input that later inputs do not predict. The codes
take sum_ij log2(sigma_ij / step_ij) + const bits. The least KL at a given total of bits is thus

    step_ij = c / sqrt(s_i d_j)

with one c for all matrices: reverse water-filling (Lifar et al. 2026, WaterSIC, for the columns). The columns' part is
absorbed by what comes before the matrix (`in_even_columns`), the rows' part is the scale of a row. Values are drawn
towards zero before they are rounded, by the Wiener factor v / (v + 1/12) for codes of variance v: near a step's bound
the cheaper code is the better one.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.second_moments import Site, shrunk
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import EVERY_SITE, Rewritten, observed, rescaled
from exporter.compress.caldera import residual
from exporter.compress.effort import Effort
from exporter.compress.method import ExpectedError
from exporter.compress.methods.ldlq import feedback_factor
from exporter.compress.rate_distortion import Curve, Int8, at_common_step, common_step, roots_of, row_steps, some_rows
from exporter.formats.format import EncodedMatrix, Float32, WeightFormat
from exporter.formats.group import WeightGroup
from exporter.formats.row_scaled import LARGEST_CODE, encode_steps, scale_type, stored_steps
from exporter.model.model import Model

DEFAULT_BITS = 3.0
# Added to the diagonal of H, as a share of itself: no input counts as predicted better than that.
DAMPING = 0.03
ROWS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 32


@dataclass(frozen=True)
class Rate:
    """Error feedback in an 8-bit format, for a rate.

    Attributes:
        bits: Bits a weight that the codes are to take when coded; where `step` is given it follows from that.
        roots: Square root of each row's s_i times d, the mean of the columns', float32 [rows]; None where the rows
            count alike.
        step: c in the formula; where the rows count alike, the step itself.
    """

    bits: float = DEFAULT_BITS
    roots: Float32 | None = None
    step: float | None = None
    name = "entropy-constrained-int8"
    supports_error_propagation = False
    error_feedback = True

    def of_rows(self, rows: NDArray[np.int64]) -> "Rate":
        """Return the method for some rows of its matrix."""
        return self if self.roots is None else replace(self, roots=self.roots[rows])

    def require(self, format: WeightFormat) -> None:
        """Refuse all but symmetric formats of 8 bits.

        Raises:
            RequestError: the format is another.
        """
        scale_type(format)

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix; without statistics of its inputs every weight is rounded by itself.

        Raises:
            RequestError: the format is not a symmetric one of 8 bits.
        """
        return self._encoded(weight, format, None if site is None else damped(site.second_moment, site.shrinkage))

    def _encoded(self, weight: Float32, format: WeightFormat, moment: Float32 | None) -> EncodedMatrix:
        problem = _Problem.of(weight, moment, self.roots)
        step = self.step if self.step is not None else 2.0 ** common_step([problem.sampled_curve()], [1], self.bits)
        steps = stored_steps(format, row_steps(weight, problem.roots, step))
        codes = problem.rounded(steps)
        steps = stored_steps(format, problem.refitted(codes, steps))
        data = encode_steps(format, codes, steps)
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Foretell the error of some rows from what they lose on the text that codes are not fitted to."""
        if site is None:
            change = self.encode(weight, format, None).planned - weight
            return ExpectedError(np.zeros(len(weight)), (change**2 @ columns).astype(np.float64))
        change = self._encoded(weight, format, damped(site.fitted, site.fitted_shrinkage)).planned - weight
        outputs = np.einsum("ij,ij->i", change @ site.held, change).astype(np.float64)
        return ExpectedError(outputs, (change**2 @ columns).astype(np.float64))


@dataclass(frozen=True)
class _Problem:
    """A matrix, or some of its rows.

    Attributes:
        weight: float32 [rows, columns].
        moment: H, damped, float32 [columns, columns]; None where inputs were not observed.
        factor: Its feedback factor U; likewise.
        roots: See `Rate`; ones where the rows count alike.
    """

    weight: Float32
    moment: Float32 | None
    factor: Float32 | None
    roots: Float32

    @classmethod
    def of(cls, weight: Float32, moment: Float32 | None, roots: Float32 | None = None) -> "_Problem":
        factor = None if moment is None else feedback_factor(moment)
        return cls(weight, moment, factor, np.ones(len(weight), np.float32) if roots is None else roots)

    @property
    def variance(self) -> float:
        """The geometric mean of the part of each input that later inputs do not predict."""
        return 1.0 if self.factor is None else math.exp(-2 * np.log(self.factor.diagonal()).mean(dtype=np.float64))

    def sampled_curve(self) -> Curve:
        """Return what rates common steps give, from some rows."""
        rows = some_rows(len(self.weight))
        some = replace(self, weight=self.weight[rows], roots=self.roots[rows])

        def rounded(step: float) -> Int8:
            return some.rounded(row_steps(some.weight, some.roots, step))

        return Curve.of(some.weight, some.roots, rounded, len(self.weight) / len(rows))

    def rounded(self, steps: Float32) -> Int8:
        """Return codes, int8 [rows, columns], for a step of each row."""
        gain = self._gain(steps)
        if self.factor is None:
            return _codes(self.weight / steps[:, None] * gain)
        chunks = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(self.weight), ROWS_AT_ONCE)]
        return np.concatenate([_fed_back(self.weight[one], steps[one], gain[one], self.factor) for one in chunks])

    def _gain(self, steps: Float32) -> Float32:
        """Return the Wiener factor of each code, float32 [rows, columns], from rows' and columns' variances."""
        squares = (self.weight / steps[:, None]) ** 2
        of_rows, of_columns = squares.mean(axis=1, keepdims=True), squares.mean(axis=0, keepdims=True)
        variance = of_rows * of_columns / max(float(squares.mean()), 1e-30)
        gain: Float32 = variance / (variance + np.float32(1 / 12))
        return gain

    def refitted(self, codes: Int8, steps: Float32) -> Float32:
        """Return the steps, float32 [rows], that suit the codes best: (q H w) / (q H q) of each row."""
        levels = codes.astype(np.float32)
        seen = levels if self.moment is None else levels @ self.moment
        square, product = np.einsum("ij,ij->i", seen, levels), np.einsum("ij,ij->i", seen, self.weight)
        usable = (square > 0) & (product > 0)
        fitted: Float32 = np.where(usable, product / np.where(usable, square, 1), steps)
        return fitted


def damped(second_moment: Float32, shrinkage: float = 0.0) -> Float32:
    """Return H with a share of its diagonal added to it, float32 [columns, columns]: the same in all coordinates.

    Args:
        second_moment: H.
        shrinkage: What is taken from all that lies off the diagonal; see `exporter.calibrate.second_moments.Site`.
    """
    diagonal = second_moment.diagonal()
    floor = np.float32(1e-6) * diagonal.mean() if diagonal.any() else np.float32(1)
    return shrunk(second_moment, shrinkage, np.float32(1 + DAMPING) * diagonal + floor)


def _codes(values: Float32) -> Int8:
    return np.clip(np.rint(values), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _fed_back(weight: Float32, steps: Float32, gain: Float32, factor: Float32) -> Int8:
    """Round some rows column by column, each error fed back into later columns."""
    columns, gains = np.ascontiguousarray(weight.T), np.ascontiguousarray(gain.T / steps)
    errors, codes = np.empty_like(columns), np.empty(columns.shape, np.int8)
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        block = slice(start, start + COLUMNS_AT_ONCE)
        left = columns[block] - factor[:start, block].T @ errors[:start]
        within = np.ascontiguousarray(factor[block, block].T)
        for column in range(len(left)):
            values = left[column] - within[column, :column] @ errors[start : start + column]
            codes[start + column] = _codes(values * gains[start + column])
            errors[start + column] = (values - codes[start + column] * steps) / within[column, column]
    return np.ascontiguousarray(codes.T)


def in_even_columns(model: Model, statistics: Statistics) -> Rewritten:
    """Return the model in coordinates in which every column of a matrix wants the same step.

    Column j is multiplied by sqrt(d_j), the deviation of an input from its prediction by later inputs.
    """

    def factors(site: str, _: Collection[str]) -> Float32:
        seen = observed(statistics.site(site), site)
        logarithms = -np.log(feedback_factor(damped(seen.second_moment, seen.shrinkage)).diagonal())
        # Only ratios matter; the rest would push scales to the ends of float16.
        even: Float32 = np.exp(logarithms - logarithms.mean())
        return even

    return rescaled(model, statistics, EVERY_SITE, factors)


def rated(
    model: Model,
    statistics: Statistics,
    groups: Sequence[WeightGroup],
    bits: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Rate]:
    """Return the method for each matrix, by name, so that together they take so many bits a weight when coded.

    All have one common step: the rate of each follows from how much it matters.

    Args:
        model: The model, in the coordinates that it is encoded in.
        statistics: In the same coordinates.
        groups: The matrices.
        bits: Bits a weight on average, tables and scales included, factors not.
        progress: Called with matrices done and their total.
        ranks: Of the factors beside matrices, by name: their codes have to hold what these leave.

    Raises:
        RequestError: no common step gives this rate.
    """

    def sampled(group: WeightGroup) -> tuple[Curve, Callable[[float, float], Rate]]:
        site = statistics.site(group.site)
        moment = None if site is None else damped(site.second_moment, site.shrinkage)
        weight = model.read(group.name)
        if group.name in ranks:
            sensitivity = statistics.sensitivity(group.layer, group.role)
            weight = residual(weight, ranks[group.name], observed(site, group.site), sensitivity)
        problem = _Problem.of(weight, moment)
        roots = roots_of(statistics, group, problem.variance)
        curve = replace(problem, roots=roots).sampled_curve()
        return curve, lambda rate, step: Rate(rate, roots, step)

    return at_common_step(groups, bits, sampled, progress)


def at(effort: Effort) -> Rate:
    """Return the method for one matrix by itself; `rated` spreads bits over several."""
    return Rate()
