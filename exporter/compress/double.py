"""Double compression: 8-bit integers with steps so coarse that entropy coding makes a second compression of them.

After Wang et al. 2025, "When Compression Meets Model Compression" (arXiv 2502.15443), of which no code is published;
the choices here are ours. Inputs' channels are divided by how far they reach, which goes into the weights
(`exporter.compress.equalise`); every row has one step, a share of its largest weight; weights that can move an output
by little, |w| max|x|, become zero; the rest is rounded to the nearest step. Steps and zeros follow from the bits that
the codes are to take when coded (`exporter.coding`). The file is the runtime's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.coding.streams import coded_bits
from exporter.compress.equalise import Rewritten, equalised
from exporter.compress.method import ExpectedError
from exporter.compress.rtn import error_of
from exporter.effort import Effort
from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.weights.format import EncodedMatrix, Float32, WeightFormat
from exporter.weights.group import WeightGroup
from exporter.weights.stepped import LARGEST_CODE, encode_steps, stored_steps

DEFAULT_BITS = 3.6
# How much of the inputs' spread goes into the weights; see `exporter.compress.equalise`.
ALPHA = 0.5
SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out", "head_in")
# Of the weights that the steps leave, this share becomes zero.
ZEROED = 0.02
# How many times coarser than those of 8 bits steps can be.
COARSEST = 128.0
SEARCHES = 12
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Double:
    """Round to the nearest of steps as coarse as the bits ask for.

    Attributes:
        bits: Bits a weight that the codes are to take when coded.
        largest: The largest magnitude seen of each input, float32 [columns]; None for the deviations at hand.
        zeroed: Share of the weights that become zero because they move the outputs least.
    """

    bits: float = DEFAULT_BITS
    largest: Float32 | None = None
    zeroed: float = ZEROED
    name = "double"

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix.

        Raises:
            RequestError: the format is not a symmetric one of 8 bits, or no step gives the rate.
        """
        reach = self.largest
        if reach is None:
            reach = np.ones(weight.shape[1], np.float32) if site is None else np.sqrt(site.squares)
        coarseness = self._coarseness(weight, reach)
        steps = stored_steps(format, _steps(weight, coarseness))
        data = encode_steps(format, self._codes(weight, steps, reach), steps)
        return EncodedMatrix(data, format.decode_rows(data, weight.shape[1]))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Return the error itself, as of rounding to the nearest."""
        return error_of(self.encode(weight, format, site).planned - weight, site, columns)

    def _coarseness(self, weight: Float32, reach: Float32) -> float:
        """Return how many times coarser than those of 8 bits steps are at the rate asked for, by halving."""
        rows = np.unique(np.linspace(0, len(weight) - 1, min(len(weight), SAMPLED_ROWS)).astype(np.int64))
        some, times = weight[rows], len(weight) / len(rows)
        low, high = 0.0, math.log2(COARSEST)
        if not self._rate(some, reach, COARSEST, times) <= self.bits <= self._rate(some, reach, 1.0, times):
            raise RequestError("no step gives this rate", got=f"{self.bits:g} bits a weight", where=self.name)
        for _ in range(SEARCHES):
            middle = (low + high) / 2
            if self._rate(some, reach, 2.0**middle, times) > self.bits:
                low = middle
            else:
                high = middle
        return float(2.0**high)

    def _rate(self, weight: Float32, reach: Float32, coarseness: float, times: float) -> float:
        codes = self._codes(weight, _steps(weight, coarseness), reach)
        return float(coded_bits(codes.view(np.uint8), times) / (codes.size * times) + 16 / codes.shape[1])

    def _codes(self, weight: Float32, steps: Float32, reach: Float32) -> NDArray[np.int8]:
        """Return the nearest codes, int8 [rows, columns], those that move the outputs least zero."""
        nearest = np.rint(weight / steps[:, None])
        codes: NDArray[np.int8] = np.clip(nearest, -LARGEST_CODE, LARGEST_CODE).astype(np.int8)
        moved = np.abs(codes) * steps[:, None] * reach
        left = moved[codes != 0]
        if self.zeroed and left.size:
            codes[moved <= np.quantile(left, self.zeroed)] = 0
        return codes


def _steps(weight: Float32, coarseness: float) -> Float32:
    """Return the step of each row, float32 [rows]."""
    steps: Float32 = np.abs(weight).max(axis=1) * np.float32(coarseness / LARGEST_CODE)
    return np.where(steps > 0, steps, np.float32(1))


def in_scaled_channels(model: Model, statistics: Statistics, sites: Sequence[str] = SITES) -> Rewritten:
    """Return the model with channels scaled by how far they reach, the compressible form of it."""
    return equalised(model, statistics, ALPHA, sites)


def doubled(
    statistics: Statistics, groups: Sequence[WeightGroup], bits: float, zeroed: float = ZEROED
) -> dict[str, Double]:
    """Return the method for each matrix, by name, at a rate in bits a weight.

    Args:
        statistics: In the coordinates that the matrices are encoded in.
        groups: The matrices.
        bits: Bits a weight of each, tables and scales included.
        zeroed: Share of the weights that become zero.
    """
    made = {}
    for group in groups:
        ranges = statistics.ranges(group.site)
        made[group.name] = Double(bits, None if ranges is None else ranges.largest, zeroed)
    return made


def at(effort: Effort) -> Double:
    """Return the method for one matrix by itself."""
    return Double()
