"""Double compression: 8-bit integers with steps so coarse that entropy coding compresses them a second time.

After Wang et al. 2025, "When Compression Meets Model Compression" (arXiv 2502.15443), which has no published code; the
choices here are this exporter's. Input channels are divided by a root of their magnitude, and the weights are
multiplied by it (`exporter.compress.awq_scaling`). Step sizes are chosen for the entropy-coded size of the codes
(`exporter.coding`), weighted by the sensitivity of the rows of all matrices (`exporter.compress.rate_distortion`).
Weights are rounded to nearest; optionally, those with the least |w| max|x| become zero. The file has the runtime's own
format.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import Rewritten, scaled_channels
from exporter.compress.effort import Effort
from exporter.compress.method import ExpectedError
from exporter.compress.methods.rtn import error_of
from exporter.compress.rate_distortion import Curve, Int8, at_common_step, common_step, roots_of, row_steps, some_rows
from exporter.formats.format import EncodedMatrix, Float32, WeightFormat
from exporter.formats.group import WeightGroup
from exporter.formats.row_scaled import LARGEST_CODE, encode_steps, scale_type, stored_steps
from exporter.model.model import Model

DEFAULT_BITS = 3.8
# Half of the inputs' magnitude goes into the weights. A row has one step and codes of 8 bits, so a channel with much
# larger weights than the others would make the step coarse for all of them.
ALPHA = 0.5
# Share of the nonzero codes that become zero. At equal bits, 2 % lose a quarter more than none, 0.091 against 0.072
# nats (tests/benchmarks/test_coding.py, 3.85 bits).
ZEROED = 0.0


@dataclass(frozen=True)
class CoarseInt8:
    """Rounding to nearest, with steps as coarse as the bits require.

    Attributes:
        bits: Target bits per weight of the coded codes; if `step` is given, the rate follows from it.
        largest: The largest observed magnitude of each input, float32 [columns]; None to use its root mean square.
        zeroed: Share of the weights that become zero because they move the outputs least.
        roots: Divisor of the step in each row, float32 [rows]; None if all rows count alike.
        step: The common step.
    """

    bits: float = DEFAULT_BITS
    largest: Float32 | None = None
    zeroed: float = ZEROED
    roots: Float32 | None = None
    step: float | None = None
    name = "coarse-int8"
    supports_error_propagation = False
    error_feedback = False
    keeps_codes = False

    def of_rows(self, rows: NDArray[np.int64]) -> "CoarseInt8":
        """Return the method for some rows of its matrix."""
        return self if self.roots is None else replace(self, roots=self.roots[rows])

    def require(self, format: WeightFormat) -> None:
        """Refuse all formats but symmetric ones of 8 bits.

        Raises:
            RequestError: the format is another one.
        """
        scale_type(format)

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix.

        Raises:
            RequestError: the format is not a symmetric one of 8 bits, or no step gives the rate.
        """
        roots = np.ones(len(weight), np.float32) if self.roots is None else self.roots
        reach = self.largest
        if reach is None:
            reach = np.ones(weight.shape[1], np.float32) if site is None else np.sqrt(site.squares)
        step = self.step
        if step is None:
            step = 2.0 ** common_step([self.sampled_curve(weight, roots, reach)], [1], self.bits)
        steps = stored_steps(format, row_steps(weight, roots, step))
        data = encode_steps(format, self._codes(weight, steps, reach), steps)
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Return the actual error: none of it is fitted to the text."""
        return error_of(self.encode(weight, format, site).planned - weight, site, columns)

    def sampled_curve(self, weight: Float32, roots: Float32, reach: Float32) -> Curve:
        """Return the rates at common steps, measured on some rows of a matrix, float32 [rows, columns]."""
        rows = some_rows(len(weight))
        some, counted = weight[rows], roots[rows]

        def rounded(step: float) -> Int8:
            return self._codes(some, row_steps(some, counted, step), reach)

        return Curve.of(some, counted, rounded, len(weight) / len(rows))

    def _codes(self, weight: Float32, steps: Float32, reach: Float32) -> Int8:
        """Return the nearest codes, int8 [rows, columns]; those that move the outputs least become zero."""
        nearest = np.rint(weight / steps[:, None])
        codes: Int8 = np.clip(nearest, -LARGEST_CODE, LARGEST_CODE).astype(np.int8)
        moved = np.abs(codes) * steps[:, None] * reach
        left = moved[codes != 0]
        if self.zeroed and left.size:
            codes[moved <= np.quantile(left, self.zeroed)] = 0
        return codes


def in_scaled_channels(model: Model, statistics: Statistics) -> Rewritten:
    """Return the model with channels scaled by their magnitude, the form that this method compresses."""
    return scaled_channels(model, statistics, ALPHA)


def coarse_int8_methods(
    model: Model,
    statistics: Statistics,
    groups: Sequence[WeightGroup],
    bits: float,
    zeroed: float = ZEROED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, CoarseInt8]:
    """Return the method for each matrix, by name, so that together they take this many bits per weight when coded.

    Args:
        model: The model, in the coordinates in which it is encoded.
        statistics: In the same coordinates.
        groups: The matrices.
        bits: Average bits per weight, including tables and scales.
        zeroed: Share of the weights that become zero.
        progress: Called with matrices done and their total.

    Raises:
        RequestError: no common step gives this rate.
    """

    def sampled(group: WeightGroup) -> tuple[Curve, Callable[[float, float], CoarseInt8]]:
        site, ranges = statistics.site(group.site), statistics.ranges(group.site)
        variance = 1.0 if site is None else float(site.second_moment.trace() / group.columns)
        roots = roots_of(statistics, group, variance)
        reach = np.ones(group.columns, np.float32) if ranges is None else ranges.largest
        method = CoarseInt8(bits, reach, zeroed, roots)
        curve = method.sampled_curve(model.read(group.name), roots, reach)
        return curve, lambda rate, step: replace(method, bits=rate, step=step)

    return at_common_step(groups, bits, sampled, progress)


def at(effort: Effort) -> CoarseInt8:
    """Return the method for a single matrix; `coarse_int8_methods` distributes bits over several."""
    return CoarseInt8()
