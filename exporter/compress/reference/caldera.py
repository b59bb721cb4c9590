"""CALDERA as published: W = Q + L R with all three rounded (Saha et al. 2024, NeurIPS, algorithm 1).

Q, L and R minimise tr(D H D^T), D = Q + L R - W, H = E[x x^T]. Q is LDLQ of W - L R with H downdated by the span of
L R. L and R are the rank-constrained regression of W - Q, then each is fitted to the other rounded. The two updates
alternate, and the best iterate is kept. No runtime supports this form: lattice, rotation and fractional bits serve the
comparison with the publication. Runtimes use `exporter.compress.caldera`.

Two things differ from the publication: every component of L and R has its own scale, and a rotation whose size is not a
power of two is completed by a Hartley transform.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from exporter.compress.hadamard import random_rotation
from exporter.compress.lowrank import (
    downdated,
    fitted_left,
    fitted_right,
    largest_channels,
    regression,
    regression_on,
    weighted_error,
)
from exporter.compress.reference import lattice
from exporter.compress.reference.ldlq import BlockLdlq
from exporter.compress.reference.rounders import E8P, Rounder
from exporter.formats.format import Float32
from exporter.foundation.errors import RequestError

Part = Literal["Q", "LR"]
SCALE_BITS = 16


@dataclass(frozen=True)
class CalderaOptions:
    """Options of the reference form.

    Attributes:
        rank: Rank of L R; 0 for Q only.
        factor_bits: Bits per weight of L and R: 4 (lattice), 8 (integers) or 16 (float16).
        rounder: The rounder of Q.
        order: The order of the two updates.
        outliers: Number of columns, those of the largest inputs, that initialise L R (ODLRI); 0 starts with L R = 0.
        iterations: Iterations of Q and L R.
        factor_iterations: Iterations of L and R within each of these.
        polish: Passes of descent over Q after LDLQ.
        downdate: Exclude from Q's loss the directions that L R can represent.
        rotate: Rotate inputs and outputs at random.
        damping: Added to the diagonal of H, as a share of its mean; also after a downdate.
        seed: Seed of the rotation.
    """

    rank: int = 64
    factor_bits: int = 4
    rounder: Rounder = field(default_factory=E8P)
    order: tuple[Part, Part] = ("LR", "Q")
    outliers: int = 0
    iterations: int = 20
    factor_iterations: int = 10
    polish: int = 1
    downdate: bool = True
    rotate: bool = True
    damping: float = 0.01
    seed: int = 0

    def check(self, rows: int, columns: int) -> None:
        """Refuse options that do not fit a matrix.

        Raises:
            RequestError: see the messages.
        """
        if not 0 <= self.rank <= min(rows, columns):
            raise RequestError("the rank is above the matrix's", got=self.rank, expected=f"0 to {min(rows, columns)}")
        if self.factor_bits not in FACTOR_ROUNDERS:
            raise RequestError("no factors of so many bits", got=self.factor_bits, expected="4, 8 or 16")
        if sorted(self.order) != ["LR", "Q"]:
            raise RequestError("unknown order of updates", got=self.order, expected="LR and Q, each once")
        if self.outliers and self.order[0] == "LR":
            raise RequestError(
                "an order that begins with LR forgets the factors that outliers gave",
                got=self.order,
                next_step="begin with Q",
            )
        if not 0 <= self.outliers <= self.rank:
            raise RequestError("more outliers than ranks", got=self.outliers, expected=f"0 to {self.rank}")
        width = lattice.WIDTH if self.factor_bits == 4 and self.rank else 1
        for size, wide in ((columns, max(self.rounder.width, width)), (rows, width)):
            if size % wide:
                raise RequestError(
                    "the lattice rounds eight weights at once", got=size, expected=f"multiples of {wide}"
                )


@dataclass(frozen=True)
class Decomposition:
    """W = Q + L R, in the coordinates of W.

    Attributes:
        base: Q, float32 [rows, columns].
        left: L, float32 [rows, rank].
        right: R, float32 [rank, columns].
        bits: Bits per weight of W: codes of Q, L and R, and a scale of 16 bits for each component of L and R.
        errors: tr(D H D^T) / tr(W H W^T) of the best iterate after each update.
    """

    base: Float32
    left: Float32
    right: Float32
    bits: float
    errors: tuple[float, ...]

    @property
    def planned(self) -> Float32:
        """Q + L R, float32 [rows, columns]."""
        return self.base + self.left @ self.right


def decompose(weight: Float32, moment: Float32, options: CalderaOptions) -> Decomposition:
    """Decompose a matrix.

    Args:
        weight: W, float32 [rows, columns].
        moment: H, float32 [columns, columns].
        options: Options of the decomposition.

    Raises:
        RequestError: the options do not fit the matrix.
    """
    rows, columns = weight.shape
    options.check(rows, columns)
    moment = _regular(moment, options.damping)
    # The first L and R represent W on the columns of the largest inputs (Cho et al. 2025, ODLRI), or are zero.
    outliers = regression_on(largest_channels(moment, options.outliers), weight, moment, options.rank)
    if not options.rotate:
        return _alternate(weight, moment, outliers, options)
    chance = np.random.default_rng(options.seed)
    inputs, outputs = random_rotation(columns, chance), random_rotation(rows, chance)
    left, right = outliers
    start = outputs @ left, right @ inputs.T
    found = _alternate(_between(outputs, weight, inputs.T), _between(inputs, moment, inputs.T), start, options)
    base = _between(outputs.T, found.base, inputs)
    return replace(found, base=base, left=outputs.T @ found.left, right=found.right @ inputs)


def _between(first: Float32, middle: Float32, last: Float32) -> Float32:
    half: Float32 = first @ middle
    product: Float32 = half @ last
    return product


def _regular(moment: Float32, damping: float) -> Float32:
    """Return H scaled to a mean diagonal of 1, with damping added."""
    mean = float(moment.trace(dtype=np.float64)) / len(moment) or 1.0
    regular = moment / np.float32(mean)
    regular[np.diag_indices_from(regular)] += np.float32(damping)
    return regular


def _alternate(
    weight: Float32, moment: Float32, start: tuple[Float32, Float32], options: CalderaOptions
) -> Decomposition:
    """Alternate between Q and L R and keep the best iterate."""
    base, (left, right) = np.zeros_like(weight), start
    whole = weighted_error(weight, moment)
    bits, errors, done = 0.0, list[float](), set[Part]()
    best: tuple[Float32, Float32, Float32] | None = None
    # Without L R there is nothing to alternate with.
    for _ in range(options.iterations if options.rank else 1):
        for part in options.order:
            if part == "Q":
                base, bits = _base(weight - left @ right, moment, right, options)
            elif options.rank:
                left, right = factors(weight - base, moment, options)
            done.add(part)
            error = weighted_error(base + left @ right - weight, moment) / whole
            if len(done) == 2 and (best is None or error < errors[-1]):
                best, best_bits = (base, left, right), bits
                errors.append(error)
            elif errors:
                errors.append(errors[-1])
    assert best is not None
    rows, columns = weight.shape
    factor_bits = options.rank * ((rows + columns) * options.factor_bits + 2 * SCALE_BITS * (options.factor_bits < 16))
    return Decomposition(*best, best_bits + factor_bits / weight.size, tuple(errors))


def factors(target: Float32, moment: Float32, options: CalderaOptions) -> tuple[Float32, Float32]:
    """Return rounded L and R: the closed form, then each fitted to the rounded other; the best pair is kept."""
    rounded = FACTOR_ROUNDERS[options.factor_bits]
    left, right = regression(target, moment, options.rank)
    left, right = rounded(left.T).T, rounded(right)
    best, least = (left, right), weighted_error(target - left @ right, moment)
    for _ in range(options.factor_iterations):
        left = rounded(fitted_left(target, moment, right).T).T
        right = rounded(fitted_right(target, left))
        error = weighted_error(target - left @ right, moment)
        if error < least:
            best, least = (left, right), error
    return best


def _lattice_twice(components: Float32) -> Float32:
    scale = np.sqrt(np.square(components).mean(axis=1, keepdims=True)) / np.float32(lattice.SCALE)
    scale[scale == 0] = 1
    groups = np.ascontiguousarray(components / scale).reshape(-1, lattice.WIDTH)
    rounded: Float32 = lattice.nearest_twice(groups).reshape(components.shape) * scale
    return rounded


def _integers(components: Float32) -> Float32:
    scale = np.abs(components).max(axis=1, keepdims=True) / 127
    scale[scale == 0] = 1
    rounded: Float32 = np.rint(components / scale) * scale
    return rounded


def _halves(components: Float32) -> Float32:
    return components.astype(np.float16).astype(np.float32)


# Bits -> function that rounds the components of a factor, float32 [rank, size], each on its own scale.
FACTOR_ROUNDERS = {4: _lattice_twice, 8: _integers, 16: _halves}


def _base(residual: Float32, moment: Float32, right: Float32, options: CalderaOptions) -> tuple[Float32, float]:
    """Return Q for W - L R, and its bits per weight."""
    if options.downdate and right.any():
        moment = downdated(moment, right)
        mean = np.float32(options.damping * (1 + moment.trace(dtype=np.float64) / len(moment)))
        moment[np.diag_indices_from(moment)] += mean
    return options.rounder.encode(residual, BlockLdlq(moment, options.rounder.width, options.polish))
