"""A chosen rate in an 8-bit format: error feedback with steps chosen for the entropy of the codes.

The file has the runtime's own format of 8 bits per weight; coded (`exporter.coding`), its size is the entropy of its
codes. With D = E V the error after feedback (`exporter.compress.methods.ldlq`), a matrix costs
sum_ij s_i d_j step_ij^2 / 24 in KL. Here s_i is a row's sensitivity, and d_j = 1 / U_jj^2 the part of an input that
later inputs do not predict. The codes take sum_ij log2(sigma_ij / step_ij) + const bits. The KL at a given total of
bits is thus least with

    step_ij = c / sqrt(s_i d_j)

with one c for all matrices: reverse water-filling (Lifar et al. 2026, WaterSIC, for the columns). The columns' part is
folded into the layer before the matrix (`in_even_columns`); the rows' part is the scale of a row. Before rounding,
values are shrunk by the Wiener factor v / (v + 1/12) for codes of variance v: near a decision boundary, the cheaper
code is the better one.
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
# Added to the diagonal of H, as a share of itself; it limits how well an input counts as predicted.
DAMPING = 0.03
ROWS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 32


@dataclass(frozen=True)
class EntropyConstrainedInt8:
    """Error feedback in an 8-bit format, for a target rate.

    Attributes:
        bits: Target bits per weight of the coded codes; if `step` is given, the rate follows from it.
        roots: Square root of each row's s_i times d, the mean of the columns', float32 [rows]; None if the rows count
            alike.
        step: c in the formula; if the rows count alike, the step itself.
    """

    bits: float = DEFAULT_BITS
    roots: Float32 | None = None
    step: float | None = None
    name = "entropy-constrained-int8"
    supports_error_propagation = False
    error_feedback = True
    keeps_codes = False

    def of_rows(self, rows: NDArray[np.int64]) -> "EntropyConstrainedInt8":
        """Return the method for some rows of its matrix."""
        return self if self.roots is None else replace(self, roots=self.roots[rows])

    def require(self, format: WeightFormat) -> None:
        """Refuse all formats but symmetric ones of 8 bits.

        Raises:
            RequestError: the format is another one.
        """
        scale_type(format)

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix; without statistics of its inputs every weight is rounded independently.

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
        """Predict the error of some rows from their loss on text that codes are not fitted to."""
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
        moment: H, damped, float32 [columns, columns]; None if inputs were not observed.
        factor: Its feedback factor U; None likewise.
        roots: See `EntropyConstrainedInt8`; ones if the rows count alike.
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
        """Return the rates at common steps, measured on some rows."""
        rows = some_rows(len(self.weight))
        some = replace(self, weight=self.weight[rows], roots=self.roots[rows])

        def rounded(step: float) -> Int8:
            return some.rounded(row_steps(some.weight, some.roots, step))

        return Curve.of(some.weight, some.roots, rounded, len(self.weight) / len(rows))

    def rounded(self, steps: Float32) -> Int8:
        """Return codes, int8 [rows, columns], given a step for each row."""
        gain = self._gain(steps)
        if self.factor is None:
            return _codes(self.weight / steps[:, None] * gain)
        chunks = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(self.weight), ROWS_AT_ONCE)]
        return np.concatenate([_fed_back(self.weight[one], steps[one], gain[one], self.factor) for one in chunks])

    def _gain(self, steps: Float32) -> Float32:
        """Return the Wiener factor of each code, float32 [rows, columns], from variances of rows and columns."""
        squares = (self.weight / steps[:, None]) ** 2
        of_rows, of_columns = squares.mean(axis=1, keepdims=True), squares.mean(axis=0, keepdims=True)
        variance = of_rows * of_columns / max(float(squares.mean()), 1e-30)
        gain: Float32 = variance / (variance + np.float32(1 / 12))
        return gain

    def refitted(self, codes: Int8, steps: Float32) -> Float32:
        """Return the best steps for the codes, float32 [rows]: (q H w) / (q H q) of each row."""
        levels = codes.astype(np.float32)
        seen = levels if self.moment is None else levels @ self.moment
        square, product = np.einsum("ij,ij->i", seen, levels), np.einsum("ij,ij->i", seen, self.weight)
        usable = (square > 0) & (product > 0)
        fitted: Float32 = np.where(usable, product / np.where(usable, square, 1), steps)
        return fitted


def damped(second_moment: Float32, shrinkage: float = 0.0) -> Float32:
    """Return H plus a share of its diagonal, float32 [columns, columns]; the share is the same in all coordinates.

    Args:
        second_moment: H.
        shrinkage: Share removed from off-diagonal elements; see `exporter.calibrate.second_moments.Site`.
    """
    diagonal = second_moment.diagonal()
    floor = np.float32(1e-6) * diagonal.mean() if diagonal.any() else np.float32(1)
    return shrunk(second_moment, shrinkage, np.float32(1 + DAMPING) * diagonal + floor)


def _codes(values: Float32) -> Int8:
    return np.clip(np.rint(values), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _fed_back(weight: Float32, steps: Float32, gain: Float32, factor: Float32) -> Int8:
    """Round some rows column by column and feed each error back into later columns."""
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
    """Return the model in coordinates in which every column of a matrix needs the same step.

    Column j is multiplied by sqrt(d_j), the deviation of an input from its prediction by later inputs.
    """

    def factors(site: str, _: Collection[str]) -> Float32:
        seen = observed(statistics.site(site), site)
        logarithms = -np.log(feedback_factor(damped(seen.second_moment, seen.shrinkage)).diagonal())
        # Only ratios matter; a common factor would push scales to the limits of float16.
        even: Float32 = np.exp(logarithms - logarithms.mean())
        return even

    return rescaled(model, statistics, EVERY_SITE, factors)


def entropy_constrained_methods(
    model: Model,
    statistics: Statistics,
    groups: Sequence[WeightGroup],
    bits: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, EntropyConstrainedInt8]:
    """Return the method for each matrix, by name, so that together they take this many bits per weight when coded.

    All share one common step: the rate of each follows from how much it matters.

    Args:
        model: The model, in the coordinates in which it is encoded.
        statistics: In the same coordinates.
        groups: The matrices.
        bits: Average bits per weight, including tables and scales but not factors.
        progress: Called with matrices done and their total.
        ranks: Ranks of the matrices' factors, by name; the codes then represent the residual of the factors.

    Raises:
        RequestError: no common step gives this rate.
    """

    def sampled(group: WeightGroup) -> tuple[Curve, Callable[[float, float], EntropyConstrainedInt8]]:
        site = statistics.site(group.site)
        moment = None if site is None else damped(site.second_moment, site.shrinkage)
        weight = model.read(group.name)
        if group.name in ranks:
            sensitivity = statistics.sensitivity(group.layer, group.part)
            weight = residual(weight, ranks[group.name], observed(site, group.site), sensitivity)
        problem = _Problem.of(weight, moment)
        roots = roots_of(statistics, group, problem.variance)
        curve = replace(problem, roots=roots).sampled_curve()
        return curve, lambda rate, step: EntropyConstrainedInt8(rate, roots, step)

    return at_common_step(groups, bits, sampled, progress)


def at(effort: Effort) -> EntropyConstrainedInt8:
    """Return the method for a single matrix; `entropy_constrained_methods` distributes bits over several."""
    return EntropyConstrainedInt8()
