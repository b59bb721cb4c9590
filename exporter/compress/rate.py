"""A rate of our choice in an 8-bit format: error feedback with steps chosen for the entropy of the codes.

The file is the runtime's own, 8 bits a weight; coded (`exporter.coding`) it takes what its codes' entropy is. With
D = E V the error of feedback (see `exporter.compress.ldlq`), a matrix costs sum_ij s_i d_j step_ij^2 / 24 in KL, where
s_i is a row's sensitivity and d_j = 1 / U_jj^2 what of an input is not foretold by later ones, and its codes take
sum_ij log2(sigma_ij / step_ij) + const bits. Least KL at a total of bits is thus

    step_ij = c / sqrt(s_i d_j)

with one c for all matrices: reverse water-filling (Lifar et al. 2026, WaterSIC, for the columns). The columns' part is
absorbed by what comes before the matrix (`in_even_columns`), the rows' part is the scale of a row. Values are drawn
towards zero before they are rounded, by the Wiener factor v / (v + 1/12) for codes of variance v: near a step's bound
the cheaper code is the better one.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.coding.streams import coded_bits
from exporter.compress.equalise import Rewritten, rescaled
from exporter.compress.ldlq import feedback_factor
from exporter.compress.method import ExpectedError
from exporter.effort import Effort
from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.weights.format import EncodedMatrix, Float32, WeightFormat
from exporter.weights.group import WeightGroup
from exporter.weights.stepped import LARGEST_CODE, encode_steps, stored_steps

DEFAULT_BITS = 3.0
# Added to the diagonal of H, as a share of itself: no input is believed to be foretold any better than that.
DAMPING = 0.03
# Rows that hardly matter count at least so much of the mean.
LEAST_SENSITIVITY = 1e-3
ROWS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 32
SAMPLED_ROWS = 96
# Octaves around the first guess in which the common step is looked for.
OCTAVES = np.linspace(-1.5, 1.5, 7)
SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out", "head_in")
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Rate:
    """Error feedback in an 8-bit format, for a rate.

    Attributes:
        bits: Bits a weight that the codes are to take when coded; where `step` is given it follows from that.
        sensitivity: Of each row, float32 [rows]; None where all count alike.
        step: The step of a row of sensitivity 1, c in the formula.
    """

    bits: float = DEFAULT_BITS
    sensitivity: Float32 | None = None
    step: float | None = None
    name = "rate"

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix; without statistics of its inputs every weight is rounded by itself.

        Raises:
            RequestError: the format is not a symmetric one of 8 bits.
        """
        problem = _Problem.of(weight, site, self.sensitivity)
        step = self.step if self.step is not None else _step_for(problem, self.bits)
        steps = stored_steps(format, problem.steps(step))
        codes = problem.rounded(steps)
        steps = stored_steps(format, problem.refitted(codes, steps))
        data = encode_steps(format, codes, steps)
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Foretell the error of some rows from what they lose on the text that codes are not fitted to."""
        alike = replace(self, sensitivity=None)
        if site is None:
            change = alike.encode(weight, format, None).planned - weight
            return ExpectedError(np.zeros(len(weight)), (change**2 @ columns).astype(np.float64))
        fitted = replace(site, held=site.fitted, share=0.0)
        change = alike.encode(weight, format, fitted).planned - weight
        outputs = np.einsum("ij,ij->i", change @ site.held, change).astype(np.float64)
        return ExpectedError(outputs, (change**2 @ columns).astype(np.float64))


@dataclass(frozen=True)
class _Problem:
    """A matrix, or some of its rows.

    Attributes:
        weight: float32 [rows, columns].
        moment: H, damped, float32 [columns, columns]; None where inputs were not observed.
        factor: Its feedback factor U; likewise.
        roots: Square root of each row's sensitivity, float32 [rows].
    """

    weight: Float32
    moment: Float32 | None
    factor: Float32 | None
    roots: Float32

    @classmethod
    def of(cls, weight: Float32, site: Site | None, sensitivity: Float32 | None) -> "_Problem":
        moment = None if site is None else damped_moment(site.second_moment)
        factor = None if moment is None else feedback_factor(moment)
        if sensitivity is None:
            roots = np.ones(len(weight), np.float32)
        else:
            roots = np.sqrt(sensitivity + LEAST_SENSITIVITY * sensitivity.mean() + np.float32(1e-30))
        return cls(weight, moment, factor, roots)

    def steps(self, step: float) -> Float32:
        """Return the step of each row, float32 [rows]: no weight is beyond the largest code."""
        least = np.abs(self.weight).max(axis=1) / np.float32(LARGEST_CODE - 7)
        steps: Float32 = np.maximum(np.float32(step) / self.roots, least)
        return steps

    def guess(self) -> float:
        """Return log2 of the common step at which normally distributed weights take 0 bits by the formula of many."""
        spread = np.sqrt(np.mean(self.weight**2, axis=1, dtype=np.float64)) * self.roots
        return float(np.mean(np.log2(np.maximum(spread, 1e-30)))) + math.log2(2 * math.pi * math.e) / 2

    def rounded(self, steps: Float32) -> NDArray[np.int8]:
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

    def refitted(self, codes: NDArray[np.int8], steps: Float32) -> Float32:
        """Return the steps, float32 [rows], that suit the codes best: (q H w) / (q H q) of each row."""
        levels = codes.astype(np.float32)
        seen = levels if self.moment is None else levels @ self.moment
        square, product = np.einsum("ij,ij->i", seen, levels), np.einsum("ij,ij->i", seen, self.weight)
        usable = (square > 0) & (product > 0)
        fitted: Float32 = np.where(usable, product / np.where(usable, square, 1), steps)
        return fitted


def damped_moment(moment: Float32) -> Float32:
    """Return H with a share of its diagonal added to it, float32 [columns, columns]: the same in all coordinates."""
    damped = moment.copy()
    diagonal = moment.diagonal()
    floor = np.float32(1e-6) * diagonal.mean() if diagonal.any() else np.float32(1)
    damped[np.diag_indices_from(damped)] += np.float32(DAMPING) * diagonal + floor
    return damped


def _codes(values: Float32) -> NDArray[np.int8]:
    return np.clip(np.rint(values), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def _fed_back(weight: Float32, steps: Float32, gain: Float32, factor: Float32) -> NDArray[np.int8]:
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


def _step_for(problem: _Problem, bits: float) -> float:
    """Return the common step at which some rows of a matrix take so many bits a weight."""
    guess = problem.guess() - bits
    rates = [_rate_at(problem, 2.0 ** (guess + octave)) for octave in OCTAVES]
    return _crossing(guess, np.array(rates), bits)


def _crossing(guess: float, rates: Float64, bits: float) -> float:
    """Return the step at which rates, falling over `OCTAVES` around 2^guess, are so many bits."""
    falling = np.minimum.accumulate(rates)
    if not falling[-1] <= bits <= falling[0]:
        raise RequestError(
            "no step gives this rate", got=f"{bits:g} bits a weight",
            expected=f"from {falling[-1]:.2f} to {falling[0]:.2f}",
        )  # fmt: skip
    return float(2.0 ** (guess + np.interp(-bits, -falling, OCTAVES)))


def _rate_at(problem: _Problem, step: float, times: float = 1.0) -> float:
    """Return the bits a weight, tables and scales included, that a matrix takes at a common step.

    Args:
        problem: The matrix or some of its rows.
        step: The common step.
        times: How many times as many rows the matrix has.
    """
    codes = problem.rounded(problem.steps(step))
    bits = coded_bits(codes.view(np.uint8), times) + 16 * len(codes) * times
    return bits / (codes.size * times)


def in_even_columns(model: Model, statistics: Statistics, sites: Sequence[str] = SITES) -> Rewritten:
    """Return the model in coordinates in which every column of a matrix wants the same step.

    Column j is multiplied by sqrt(d_j), what an input's deviation is from what later inputs foretell of it.
    """

    def factors(site: str, _: Collection[str]) -> Float32:
        seen = statistics.site(site)
        if seen is None:
            raise RequestError("the activations were not observed", where=site)
        logarithms = -np.log(feedback_factor(damped_moment(seen.second_moment)).diagonal())
        # Only ratios matter; the rest would push scales to the ends of float16.
        even: Float32 = np.exp(logarithms - logarithms.mean())
        return even

    return rescaled(model, statistics, sites, factors)


def rated(
    model: Model,
    statistics: Statistics,
    groups: Sequence[WeightGroup],
    bits: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Rate]:
    """Return the method for each matrix, by name, so that together they take so many bits a weight when coded.

    All have one common step: the rate of each follows from how much it matters.

    Args:
        model: The model, in the coordinates that it is encoded in.
        statistics: In the same coordinates.
        groups: The matrices.
        bits: Bits a weight on average, tables and scales included.
        progress: Called with matrices done and their total.

    Raises:
        RequestError: no common step gives this rate.
    """
    weights = np.array([group.size for group in groups], np.float64)
    sampled = [_sensitivities(statistics, group) for group in groups]
    chosen = [_spread(group.rows) for group in groups]
    guesses = [
        _Problem.of(model.read(group.name)[rows], None, sensitivity[rows]).guess()
        for group, rows, sensitivity in zip(groups, chosen, sampled, strict=True)
    ]
    guess = float(np.average(guesses, weights=weights)) - bits
    rates = np.empty((len(groups), len(OCTAVES)))
    for number, (group, rows, sensitivity) in enumerate(zip(groups, chosen, sampled, strict=True)):
        progress(number, len(groups))
        weight = model.read(group.name)[rows]
        whole = _Problem.of(weight, statistics.site(group.site), None)
        # The roots are those of the whole matrix's sensitivities.
        problem = replace(whole, roots=_Problem.of(weight, None, sensitivity).roots[rows])
        times = group.rows / len(rows)
        rates[number] = [_rate_at(problem, 2.0 ** (guess + octave), times) for octave in OCTAVES]
    progress(len(groups), len(groups))
    step = _crossing(guess, weights @ rates / weights.sum(), bits)
    at = math.log2(step) - guess
    return {
        group.name: Rate(float(np.interp(at, OCTAVES, mine)), sensitivity, step)
        for group, mine, sensitivity in zip(groups, rates, sampled, strict=True)
    }


def _sensitivities(statistics: Statistics, group: WeightGroup) -> Float32:
    return statistics.sensitivity(group.layer, "head" if group.layer is None else group.role)


def _spread(rows: int) -> NDArray[np.int64]:
    """Return some rows, evenly spread: neighbouring ones belong to one head."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).astype(np.int64))


def at(effort: Effort) -> Rate:
    """Return the method for one matrix by itself; `rated` spreads bits over several."""
    return Rate()
