"""Rank-constrained regression in the metric of the inputs: L R approximates A, weighted by E[x x^T] = H.

It minimises tr((A - L R) H (A - L R)^T). With any root H = M M^T, the best L holds the first left singular vectors of
A M, and R = L^T A, whatever the root (Eckart and Young 1936; Saha et al. 2024, CALDERA, lemma 4.1).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.compress.hadamard import rotation
from exporter.formats.format import Float32

Factors = tuple[Float32, Float32]
# Ridge, as a share of a Gram matrix's mean diagonal, so that factors with an empty component can be fitted too.
RIDGE = 1e-7
# As a share of the largest component's magnitude; smaller components are not scaled up any further.
LEAST_MAGNITUDE = 1e-6


def weighted_error(change: Float32, moment: Float32) -> float:
    """Return tr(D H D^T) of a change D, float32 [rows, columns], where inputs have the second moment H."""
    return float(np.einsum("ij,ij->", change @ moment, change, dtype=np.float64))


def largest_channels(moment: Float32, count: int) -> NDArray[np.int64]:
    """Return the columns with the largest mean squares, ascending."""
    return np.sort(np.argsort(-moment.diagonal(), kind="stable")[:count])


def regression(target: Float32, moment: Float32, rank: int) -> Factors:
    """Return the best L, float32 [rows, rank], with orthonormal columns, and R, float32 [rank, columns].

    Args:
        target: A, float32 [rows, columns].
        moment: H, float32 [columns, columns], positive definite.
        rank: Rank of L R; at most the number of rows and of columns.
    """
    rows, columns = target.shape
    if rows <= columns:
        left = _first_vectors(target @ moment @ target.T, rank)
    else:
        image = target @ np.linalg.cholesky(moment.astype(np.float64))
        # Orthonormal even where singular values vanish.
        left = np.linalg.qr(image @ _first_vectors(image.T @ image, rank))[0]
    small = np.ascontiguousarray(left, np.float32)
    return small, small.T @ target


def regression_on(columns: NDArray[np.int64], target: Float32, moment: Float32, rank: int) -> Factors:
    """Return L, float32 [rows, rank], and R, [rank, columns], fitted to some columns only; unused ranks are zero."""
    left, right = np.zeros((len(target), rank), np.float32), np.zeros((rank, target.shape[1]), np.float32)
    count, within = len(columns), np.ascontiguousarray(moment[np.ix_(columns, columns)])
    left[:, :count], right[:count, columns] = regression(target[:, columns], within, count)
    return left, right


def balanced_components(right: Float32, moment: Float32) -> Float32:
    """Return rows of the same span as R's, over which R x is spread evenly, float32 [rank, columns].

    L R = (L U^-1) (U R) for every invertible U, so a runtime may store either. It has few bits for L and R, and rounds
    R x in blocks as it rounds x. After regression, one component is tens of times as large as most others in its block,
    and rounding costs up to three times as much as the rounding of x. U divides each component by the square root of
    its magnitude, which leaves the other half to L, and rotates all of them.

    Args:
        right: R, float32 [rank, columns].
        moment: H, float32 [columns, columns].
    """
    magnitude = np.sqrt(np.maximum(np.einsum("ij,ij->i", right @ moment, right), 0))
    if not magnitude.any():
        return right
    halves = np.sqrt(np.maximum(magnitude, LEAST_MAGNITUDE * magnitude.max()))
    rotated: Float32 = rotation(len(right)) @ (right / halves[:, None])
    return rotated


def _first_vectors(gram: NDArray[np.floating[Any]], count: int) -> NDArray[np.float64]:
    """Return the eigenvectors of the largest eigenvalues, the largest first, [size, count]."""
    vectors: NDArray[np.float64] = np.linalg.eigh(gram.astype(np.float64))[1]
    return vectors[:, ::-1][:, :count]


def fitted_left(target: Float32, moment: Float32, right: Float32) -> Float32:
    """Return the best L for a given R: A H R^T (R H R^T)^-1."""
    image = moment @ right.T
    return np.ascontiguousarray(_solved(right @ image, (target @ image).T).T)


def fitted_right(target: Float32, left: Float32) -> Float32:
    """Return the best R for a given L, which does not depend on H: (L^T L)^-1 L^T A."""
    return _solved(left.T @ left, left.T @ target)


def _solved(gram: Float32, wanted: Float32) -> Float32:
    regular = gram.astype(np.float64)
    regular[np.diag_indices_from(regular)] += RIDGE * float(gram.trace(dtype=np.float64)) / len(gram) + 1e-30
    solved: Float32 = np.linalg.solve(regular, wanted.astype(np.float64)).astype(np.float32)
    return solved


def downdated(moment: Float32, right: Float32) -> Float32:
    """Return H without the span of R: H - H R^T (R H R^T)^-1 R H. L can compensate for errors in that span."""
    image: Float32 = moment @ right.T
    weights = _solved(right @ image, np.ascontiguousarray(image.T))
    spanned: Float32 = image @ weights
    spanned += spanned.T.copy()
    return moment - spanned / np.float32(2)
