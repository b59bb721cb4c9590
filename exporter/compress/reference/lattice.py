"""E8P: 65,536 points of the lattice E8, shifted by a quarter, for eight weights at 2 bits each.

The points are the sign patterns of 256 vectors of half-integers: all 227 whose squared length is at most 10, and 29 of
the 56 that are permutations of (3/2 x 5, 1/2 x 3). Seven signs are free; the eighth makes the sum of the coordinates
even, which keeps the point in its coset of D8. One more bit shifts the point by 1/4 either way (Tseng et al. 2024,
QuIP#, section 4.2, which chooses another 29).
"""

from functools import cache
from itertools import combinations, product

import numpy as np

from exporter.formats.format import Float32

WIDTH = 8
SHIFT = np.float32(0.25)
# Scale of unit Gaussian weights, for 2 bits.
SCALE = 1.03
# For 4 bits, a second stage rounds the residual of the first, enlarged by this factor.
SECOND_STAGE = np.float32(3.45)
VECTORS_AT_ONCE = 1 << 15
MOST_LENGTH = 10
SHORT, LONG = 227, 256


@cache
def magnitudes() -> tuple[Float32, Float32]:
    """Return the vectors of even and of odd sum, float32 [n, 8]; the number of minus signs has the same parity."""
    found = [one for one in product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(x * x for x in one) <= MOST_LENGTH]
    places = list(combinations(range(WIDTH), 5))
    for index in np.linspace(0, len(places) - 1, LONG - SHORT).round().astype(int):
        found.append(tuple(1.5 if place in places[index] else 0.5 for place in range(WIDTH)))
    grid = np.array(found, np.float32)
    odd = grid.sum(axis=1) % 2 == 1
    return grid[~odd], grid[odd]


def nearest(vectors: Float32) -> Float32:
    """Return the nearest points of vectors, float32 [n, 8], or occasionally one that is hardly further away.

    If a vector's own signs are not those of a point, the sign of its smallest coordinate is flipped.
    """
    chunks = (vectors[first : first + VECTORS_AT_ONCE] for first in range(0, len(vectors), VECTORS_AT_ONCE))
    return np.concatenate([_nearest(chunk) for chunk in chunks])


def _nearest(vectors: Float32) -> Float32:
    below, above = (_nearest_signed(vectors - shift) + shift for shift in (-SHIFT, SHIFT))
    closer = np.square(above - vectors).sum(axis=1) < np.square(below - vectors).sum(axis=1)
    return np.where(closer[:, None], above, below)


def _nearest_signed(vectors: Float32) -> Float32:
    even, odd = magnitudes()
    rows = np.arange(len(vectors))
    signs = np.where(vectors < 0, np.float32(-1), np.float32(1))
    other = signs.copy()
    other[rows, np.abs(vectors).argmin(axis=1)] *= -1
    own = (signs.prod(axis=1) > 0)[:, None]
    signs_of_even, signs_of_odd = np.where(own, signs, other), np.where(own, other, signs)
    scores = np.concatenate([(vectors * signs_of_even) @ even.T, (vectors * signs_of_odd) @ odd.T], axis=1)
    grid = np.concatenate([even, odd])
    scores -= np.square(grid).sum(axis=1) / 2
    best = scores.argmax(axis=1)
    found: Float32 = grid[best] * np.where((best < len(even))[:, None], signs_of_even, signs_of_odd)
    return found


def nearest_twice(vectors: Float32) -> Float32:
    """Return points of the 4-bit lattice, float32 [n, 8]: a point, plus a smaller one for the residual."""
    first = nearest(vectors)
    return first + nearest((vectors - first) * SECOND_STAGE) / SECOND_STAGE


def points() -> Float32:
    """Return all 65,536 points, float32 [65536, 8]."""
    signs = np.array(list(product((1.0, -1.0), repeat=WIDTH)), np.float32)
    pairs = zip(magnitudes(), (signs[signs.prod(axis=1) > 0], signs[signs.prod(axis=1) < 0]), strict=True)
    whole = np.concatenate([(grid[:, None] * some).reshape(-1, WIDTH) for grid, some in pairs])
    return np.concatenate([whole - SHIFT, whole + SHIFT])
