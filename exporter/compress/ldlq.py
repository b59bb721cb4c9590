"""LDLQ error feedback: what rounding a column costs is paid back by the columns not yet rounded.

With H = E[x x^T] and the upper Cholesky factor U of its inverse (H^-1 = U^T U), rounding the columns in order and
adding to each later column k the feedback -(w_j - q_j) U_jk / U_jj minimises tr(D H D^T) greedily (Frantar et al.
2022, GPTQ, section 3.3; shown equal to LDLQ, optimal among such schemes, by Chee et al. 2023, QuIP, theorem 1).
Formats whose scales span several blocks get the same feedback from block to block.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy.linalg import solve_triangular

from exporter.weights.format import Bytes, EncodedMatrix, Float32, Grid, WeightFormat

DAMPING = 0.01
# Rows are independent; the size is fixed so that the bytes do not depend on the number of cores.
ROWS_AT_ONCE = 1024


class Ldlq:
    """Error feedback from column to column, or from block to block.

    Args:
        damping: Added to the diagonal of H, as a share of its mean.
    """

    name = "ldlq"
    needs_second_moment = True

    def __init__(self, damping: float = DAMPING) -> None:
        self._damping = damping

    def encode(self, weight: Float32, format: WeightFormat, second_moment: Float32 | None) -> EncodedMatrix:
        """Encode one matrix; without a second moment this is round to nearest."""
        rows, columns = weight.shape
        if second_moment is None:
            data = format.encode_rows(weight, None)
        else:
            factor = feedback_factor(second_moment, self._damping)
            importance = np.ascontiguousarray(second_moment.diagonal())
            chunks = range(0, rows, ROWS_AT_ONCE)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                encode = partial(_encode_rows, format=format, factor=factor, importance=importance)
                data = np.concatenate(list(pool.map(encode, (weight[at : at + ROWS_AT_ONCE] for at in chunks))))
        return EncodedMatrix(data, format.decode_rows(data, columns))


def feedback_factor(second_moment: Float32, damping: float) -> Float32:
    """Return the upper Cholesky factor U of the inverse of the damped H, float32 [columns, columns].

    Computed without inverting H: with the lower Cholesky factor of H in reversed order, P H P = L L^T, the factor
    is U = P L^-1 P.
    """
    damped = second_moment.astype(np.float64)
    mean = damped.trace() / len(damped)
    damped[np.diag_indices_from(damped)] += damping * (mean if mean > 0 else 1.0)
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    inverse = solve_triangular(lower, np.eye(len(lower)), lower=True)
    return np.ascontiguousarray(inverse[::-1, ::-1], np.float32)


def _encode_rows(weight: Float32, format: WeightFormat, factor: Float32, importance: Float32) -> Bytes:
    """Encode some rows with feedback; columns are kept as rows of memory, since they are visited one by one."""
    left = np.array(weight.T, order="C")
    size = format.block_columns
    encoded = []
    for start in range(0, len(left), size):
        block = slice(start, start + size)
        current = np.ascontiguousarray(left[block].T)
        grid = format.grid(current, importance[block])
        if grid is None:
            data, errors = _round_block(current, format, factor[block, block], importance[block])
        else:
            data, errors = _round_columns(left[block], grid, factor[block, block])
        left[block.stop :] -= factor[block, block.stop :].T @ errors
        encoded.append(data)
    return format.join(encoded)


def _round_columns(columns: Float32, grid: Grid, factor: Float32) -> tuple[Bytes, Float32]:
    """Round the columns of one block in order; return the encoded block and the errors / U_jj, [columns, rows]."""
    codes = np.empty(columns.shape, np.uint8)
    errors = np.empty_like(columns)
    for column, values in enumerate(columns):
        codes[column], rounded = grid.round(column, values)
        errors[column] = (values - rounded) / factor[column, column]
        columns[column + 1 :] -= np.outer(factor[column, column + 1 :], errors[column])
    return grid.pack(np.ascontiguousarray(codes.T)), errors


def _round_block(block: Float32, format: WeightFormat, factor: Float32, importance: Float32) -> tuple[Bytes, Float32]:
    """Round one block with the reference quantiser; return it encoded and its errors times U_bb^-1, [columns, rows]."""
    data = format.encode_rows(block, importance)
    difference = block - format.decode_rows(data, block.shape[1])
    return data, solve_triangular(factor, difference.T, trans="T", lower=False, check_finite=False)


METHOD = Ldlq()
