"""Rotations that spread outliers over all coordinates (Tseng et al. 2024, QuIP#, section 3)."""

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32


def rotation(size: int) -> Float32:
    """Return an orthogonal matrix with entries of similar magnitude, float32 [size, size].

    It is the Kronecker product of a Hadamard matrix of the largest power of two that divides the size, and the discrete
    Hartley transform of the remaining factor, which exists for every size.
    """
    power = size & -size
    even: Float32 = np.kron(_hadamard(power), _hartley(size // power)).astype(np.float32)
    return even


def random_rotation(size: int, chance: np.random.Generator) -> Float32:
    """Return `rotation` with random signs, float32 [size, size]."""
    rotated: Float32 = rotation(size) * chance.choice(np.array([-1, 1], np.float32), size)
    return rotated


def _hadamard(size: int) -> NDArray[np.float64]:
    """Return Sylvester's orthonormal matrix of a power of two."""
    matrix: NDArray[np.float64] = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix /= np.sqrt(size)
    return matrix


def _hartley(size: int) -> NDArray[np.float64]:
    """Return the orthonormal matrix of cos + sin of 2 pi i j / size."""
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    matrix: NDArray[np.float64] = (np.cos(angle) + np.sin(angle)) / np.sqrt(size)
    return matrix
