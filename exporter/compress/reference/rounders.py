"""Rounders of the reference form: the lattice E8P at 2 bits, or a uniform scalar quantiser with entropy-coded codes.

A uniform scalar quantiser whose codes take as many bits as their entropy is as good as the lattice at 2 bits, and
supports every other rate as well (Lifar et al. 2026, WaterSIC, and the high-rate theory of Gersho and Gray 1992,
section 9.9).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from exporter.compress.reference import lattice
from exporter.formats.format import Float32

Round = Callable[[Float32], Float32]
Feedback = Callable[[Float32, Round], Float32]
SAMPLED_ROWS = 256
ATTEMPTS = 8
TOLERANCE_BITS = 0.004


class Rounder(Protocol):
    """Rounds weights a few columns at a time.

    Attributes:
        width: Columns that are rounded together.
    """

    @property
    def width(self) -> int: ...  # noqa: D102

    def encode(self, weight: Float32, feedback: Feedback) -> tuple[Float32, float]:
        """Return rounded weights, float32 [rows, columns], and their bits per weight.

        Args:
            weight: float32 [rows, columns].
            feedback: Rounds some rows, given a function that rounds float32 [rows, width].
        """


@dataclass(frozen=True)
class E8P:
    """Eight weights as a point of the lattice E8P: 2 bits per weight."""

    width: int = lattice.WIDTH

    def encode(self, weight: Float32, feedback: Feedback) -> tuple[Float32, float]:
        """Round with one scale for the whole matrix."""
        scale = np.float32(rms(weight) / lattice.SCALE)
        return feedback(weight, lambda values: lattice.nearest(values / scale) * scale), 2.0


@dataclass(frozen=True)
class EntropyCoded:
    """Multiples of one step, which is chosen for a target entropy of the codes.

    Attributes:
        bits: Bits per weight, as the entropy of the matrix's codes.
    """

    bits: float
    width: int = 1

    def encode(self, weight: Float32, feedback: Feedback) -> tuple[Float32, float]:
        """Round with a step found on some rows; one bit less of entropy is about twice the step."""
        rows = np.unique(np.linspace(0, len(weight) - 1, SAMPLED_ROWS).astype(np.int64))
        some = weight[rows]
        step = rms(weight) * 2.0 ** (2.05 - self.bits)
        for _ in range(ATTEMPTS):
            missed = entropy(feedback(some, multiples(step)), step) - self.bits
            if abs(missed) <= TOLERANCE_BITS:
                break
            step *= 2.0**missed
        rounded = feedback(weight, multiples(step))
        return rounded, entropy(rounded, step)


def multiples(step: float) -> Round:
    """Return a function that rounds to multiples of a step."""
    size = np.float32(step)
    return lambda values: np.rint(values / size) * size


def entropy(rounded: Float32, step: float) -> float:
    """Return the entropy, in bits, of the codes of multiples of a step."""
    _, counts = np.unique(np.rint(rounded / np.float32(step)).astype(np.int32), return_counts=True)
    shares = counts / rounded.size
    return float(-(shares * np.log2(shares)).sum())


def rms(values: Float32) -> float:
    """Return the root mean square; 1 if all values are zero."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) or 1.0
