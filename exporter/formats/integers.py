"""Weights that are whole multiples of a step, as formats of integers without an offset hold them: exactly.

Some models are trained for such a grid, and some quantised files hold nothing else.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Bytes, Float32

# Of weights that lie on no grid, so many rows are enough to show it.
SAMPLED_ROWS = 8
# More rows at a time would only take more memory.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Integers:
    """A matrix whose weights are whole multiples of one step, stored in float16, in every block of a row.

    Attributes:
        bits: The multiples are from -2^(bits - 1) to 2^(bits - 1) - 1, or their negatives.
        block_columns: Columns of a block.
    """

    bits: int
    block_columns: int

    def hold(self, others: "Integers") -> bool:
        """Return whether every matrix of the others is one of these: each block has one step, and bits suffice."""
        return self.bits >= others.bits and others.block_columns % self.block_columns == 0


@runtime_checkable
class HoldsIntegers(Protocol):
    """A weight format that holds some matrices of integers exactly."""

    def holds(self, integers: Integers) -> bool:
        """Return whether it holds every matrix of these."""

    def exact_rows(self, weight: Float32) -> Bytes | None:
        """Return encoded rows that decode to these very weights; None if the format has no such rows.

        Args:
            weight: float32 [rows, columns], finite.

        Returns:
            uint8 [rows, bytes of a row].
        """


def whole_multiples(
    weight: Float32, block_columns: int, bits: int, scale_type: type[np.float16 | np.float32] = np.float16
) -> tuple[NDArray[np.int16], Float32] | None:
    """Return weights as whole multiples of a step for each block, or None if some block has no such step.

    The step is the greatest common divisor of a block's weights, by Euclid's algorithm, whose remainders are exact in
    floating point; or a whole part of it, if only that can be stored.

    Args:
        weight: float32 [rows, columns], finite; the columns are a whole number of blocks.
        block_columns: Columns of a block.
        bits: The multiples are from -2^(bits - 1) to 2^(bits - 1) - 1.
        scale_type: The type that holds a step.

    Returns:
        Multiples, int16 [rows, blocks, block columns], and steps, float32 [rows, blocks]; a step may be negative.
    """
    found = []
    ends = [0, min(SAMPLED_ROWS, len(weight)), *range(ROWS_AT_ONCE, len(weight), ROWS_AT_ONCE), len(weight)]
    for first, last in pairwise(sorted(set(ends))):
        part = _multiples(weight[first:last].reshape(-1, block_columns), bits, scale_type)
        if part is None:
            return None
        found.append(part)
    multiples, steps = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return multiples.reshape(len(weight), -1, block_columns), steps.reshape(len(weight), -1)


def _multiples(
    blocks: Float32, bits: int, scale_type: type[np.float16 | np.float32]
) -> tuple[NDArray[np.int16], Float32] | None:
    """Do the same for blocks, float32 [blocks, block columns]."""
    largest = np.abs(blocks).max(axis=1)
    most = 1 << (bits - 1)
    step = _stored_steps(_common_divisors(blocks, largest / np.float32(most)), largest, most, scale_type)
    if step is None:
        return None
    multiples = np.rint(blocks / step[:, None])
    step = np.where(multiples.max(axis=1) == most, -step, step)
    multiples = np.rint(blocks / step[:, None])
    within = multiples.max(initial=0) < most and multiples.min(initial=0) >= -most
    if not within or (multiples * step[:, None] != blocks).any():
        return None
    return multiples.astype(np.int16), step.astype(np.float32)


def _common_divisors(blocks: Float32, least: Float32) -> Float32:
    """Return the greatest common divisor of each block, float32 [blocks]; one that falls below the least is not it."""
    divisor = np.zeros(len(blocks), np.float32)
    for column in np.abs(blocks.T):
        other = column.copy()
        while (other > 0).any():
            rest = np.fmod(divisor, other, where=other > 0, out=divisor.copy())
            divisor, other = np.where(other > 0, other, divisor), np.where(other > 0, rest, 0)
        if (divisor[divisor > 0] < least[divisor > 0]).any():
            break
    return divisor


def _stored_steps(
    divisor: Float32, largest: Float32, most: int, scale_type: type[np.float16 | np.float32]
) -> Float32 | None:
    """Return the largest whole part of each divisor that can be stored; 1 for zeros. None if one has no such part."""
    step = np.where(divisor > 0, np.float32(np.nan), np.float32(1))
    for parts in range(1, most + 1):
        missing = np.isnan(step)
        if not missing.any():
            return step
        with np.errstate(over="ignore", under="ignore"):
            part = (divisor[missing] / np.float32(parts)).astype(scale_type).astype(np.float32)
        whole = (part > 0) & (part * np.float32(parts) == divisor[missing])
        step[missing] = np.where(whole & (part * np.float32(most) >= largest[missing]), part, np.nan)
    return None if np.isnan(step).any() else step
