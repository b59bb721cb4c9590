"""LDLQ error feedback: what rounding a column costs is paid back by the columns not yet rounded.

With H = E[x x^T] and the upper Cholesky factor U of its inverse (H^-1 = U^T U), rounding the columns in order and
adding to each later column k the feedback -(w_j - q_j) U_jk / U_jj minimises tr(D H D^T) greedily (Frantar et al.
2022, GPTQ, section 3.3; shown equal to LDLQ, optimal among such schemes, by Chee et al. 2023, QuIP, theorem 1).
Formats whose scales span several blocks get the same feedback from block to block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.weights.format import Bytes, EncodedMatrix, Float32, Grid, WeightFormat

DAMPING = 0.01
# Rows are independent of each other. Products are BLAS's, which uses all cores; more threads were no faster.
ROWS_AT_ONCE = 2048


class Ldlq:
    """Error feedback from column to column, or from block to block.

    Args:
        damping: Added to the diagonal of H, as a share of its mean.
    """

    name = "ldlq"
    needs_second_moment = True

    def __init__(self, damping: float = DAMPING) -> None:
        self._damping = damping
        self._last: tuple[Float32, Float32] | None = None

    def encode(self, weight: Float32, format: WeightFormat, second_moment: Float32 | None) -> EncodedMatrix:
        """Encode one matrix; without a second moment this is round to nearest."""
        rows, columns = weight.shape
        if second_moment is None:
            data = format.encode_rows(weight, None)
        else:
            factor = self._factor(second_moment)
            importance = np.ascontiguousarray(second_moment.diagonal())
            chunks = (weight[first : first + ROWS_AT_ONCE] for first in range(0, rows, ROWS_AT_ONCE))
            data = np.concatenate([_encode_rows(chunk, format, factor, importance) for chunk in chunks])
        return EncodedMatrix(data, format.decode_rows(data, columns))

    def _factor(self, second_moment: Float32) -> Float32:
        """Return the factor; the last one is kept, since matrices that share an input come one after the other."""
        if self._last is None or self._last[0] is not second_moment:
            self._last = second_moment, feedback_factor(second_moment, self._damping)
        return self._last[1]


def feedback_factor(second_moment: Float32, damping: float) -> Float32:
    """Return the upper Cholesky factor U of the inverse of the damped H, float32 [columns, columns].

    Computed without inverting H: with the lower Cholesky factor of H in reversed order, P H P = L L^T, the factor
    is U = P L^-1 P.
    """
    damped = second_moment.astype(np.float64)
    mean = damped.trace() / len(damped)
    damped[np.diag_indices_from(damped)] += damping * (mean if mean > 0 else 1.0)
    inverse = _triangle_inverse(np.linalg.cholesky(damped[::-1, ::-1]))
    return np.ascontiguousarray(inverse[::-1, ::-1], np.float32)


def _triangle_inverse(lower: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the inverse of a lower triangle, by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].

    SciPy has one too, but a BLAS of its own, whose waiting threads slow down NumPy's.
    """
    size = len(lower)
    if size <= 64:
        return np.tril(np.linalg.inv(lower))
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = _triangle_inverse(lower[:half, :half])
    inverse[half:, half:] = _triangle_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse


def _encode_rows(weight: Float32, format: WeightFormat, factor: Float32, importance: Float32) -> Bytes:
    """Encode some rows with feedback; columns are kept as rows of memory, since they are visited one by one."""
    size = format.block_columns
    errors = np.empty((weight.shape[1], len(weight)), np.float32)
    encoded = []
    for start in range(0, len(errors), size):
        block = slice(start, start + size)
        left = weight.T[block] - factor[:start, block].T @ errors[:start]
        current = np.ascontiguousarray(left.T)
        grid = format.grid(current, importance[block])
        if grid is None:
            data, errors[block] = _round_block(current, format, factor[block, block], importance[block])
        else:
            data = _round_columns(left, grid, factor[block, block], errors[block])
        encoded.append(data)
    return format.join(encoded)


def _round_columns(columns: Float32, grid: Grid, factor: Float32, errors: Float32) -> Bytes:
    """Round the columns of one block in order; return the encoded block and fill in errors / U_jj, [columns, rows]."""
    codes = np.empty(columns.shape, np.uint8)
    feedback = np.ascontiguousarray(factor.T)
    for column in range(len(columns)):
        values = columns[column] - feedback[column, :column] @ errors[:column]
        codes[column], rounded = grid.round(column, values)
        np.subtract(values, rounded, out=errors[column])
        errors[column] /= factor[column, column]
    return grid.pack(np.ascontiguousarray(codes.T))


def _round_block(block: Float32, format: WeightFormat, factor: Float32, importance: Float32) -> tuple[Bytes, Float32]:
    """Round one block with the reference quantiser; return it encoded and its errors times U_bb^-1, [columns, rows]."""
    data = format.encode_rows(block, importance)
    difference = block - format.decode_rows(data, block.shape[1])
    return data, np.linalg.solve(factor.T, difference.T)


METHOD = Ldlq()
