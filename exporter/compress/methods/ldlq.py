"""LDLQ error feedback and coordinate descent: codes and scales that minimise the error of the matrix's outputs.

With H = E[x x^T] and the upper Cholesky factor U of its inverse (H^-1 = U^T U), rounding the columns in order and
adding to each later column k the feedback -(w_j - q_j) U_jk / U_jj minimises tr(D H D^T) greedily (Frantar et al.
2022, GPTQ, section 3.3; shown equal to LDLQ, optimal among such schemes, by Chee et al. 2023, QuIP, theorem 1).
Formats whose codes are not chosen one by one get the same feedback from block to block.

Coordinate descent then revisits the blocks: scales are fitted to their codes by least squares, and every code is moved
to its best value with all others fixed (as Kim et al. 2025, GuidedQuant, section 4, do for code books). Neither step
can increase the error.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.second_moments import Site, shrunk
from exporter.compress.effort import Effort
from exporter.compress.method import ExpectedError
from exporter.compress.methods.rtn import RoundToNearest
from exporter.formats.format import Bytes, EncodedMatrix, Float32, Grid, PartedGrid, WeightFormat
from exporter.foundation.fitted import fitted_value

# Share of the diagonal's median, so that a few columns of large inputs do not decide it. Other text may use directions
# in which inputs hardly vary here.
DAMPING = fitted_value("exporter.compress", "ldlq_damping")
# Share of the diagonal's mean, so that H can be inverted whatever the median is.
LEAST_DAMPING = 0.01
SWEEPS = 2
# Rows are independent of each other. BLAS computes matrix products on all cores; more threads were no faster.
ROWS_AT_ONCE = 2048
COLUMNS_AT_ONCE = 32
PANEL_COLUMNS, STRIPE_COLUMNS = 256, 512
# A matrix of up to this many columns is factored and inverted in one piece.
WHOLE_FACTOR_COLUMNS = 64


class Ldlq:
    """Error feedback from column to column, or from block to block, then coordinate descent.

    Args:
        damping: Added to the diagonal of H; see `damped`.
        sweeps: Passes of descent over a matrix.
    """

    name = "ldlq"
    supports_error_propagation = True
    error_feedback = True
    keeps_codes = False

    def __init__(self, damping: float = DAMPING, sweeps: int = SWEEPS) -> None:
        self._damping = damping
        self._sweeps = sweeps
        self._last: tuple[Site, Float32, Float32] | None = None
        self._foretold: tuple[Site, Float32, Float32, dict[int, tuple[Float32, Float32]]] | None = None

    def require(self, format: WeightFormat) -> None:
        """Accept every format."""

    def encode(self, weight: Float32, format: WeightFormat, site: Site | None) -> EncodedMatrix:
        """Encode one matrix; without statistics of its inputs this is round to nearest."""
        rows, columns = weight.shape
        if site is None:
            data = format.encode_rows(weight, None)
        else:
            moment, factor = self._moment_and_factor(site)
            chunks = (weight[first : first + ROWS_AT_ONCE] for first in range(0, rows, ROWS_AT_ONCE))
            data = np.concatenate([self._encode_rows(chunk, format, moment, factor) for chunk in chunks])
        return EncodedMatrix(data, format.decode_rows(data, columns))

    def expected_error(
        self, weight: Float32, format: WeightFormat, site: Site | None, columns: Float32
    ) -> ExpectedError:
        """Predict the error from that of rounding to nearest, e: rounding errors are alike with and without feedback.

        Feedback turns them into D = e V, where V is U with each row divided by its diagonal. U is fitted to most of the
        text; the rest of the text gives the cost of such errors on text that they were not fitted to.
        """
        if site is None:
            return RoundToNearest().expected_error(weight, format, None, columns)
        importance = np.ascontiguousarray(site.fitted.diagonal())
        errors = format.decode_rows(format.encode_rows(weight, importance), weight.shape[1])
        errors -= weight
        errors *= errors
        block = format.block_columns if format.grid(weight[:1, : format.block_columns], None) is None else 1
        costs = self._costs(site, block, columns)
        outputs, lookups = (errors @ cost for cost in costs)
        return ExpectedError(outputs.astype(np.float64), lookups.astype(np.float64))

    def _costs(self, site: Site, block: int, columns: Float32) -> tuple[Float32, Float32]:
        """Return the cost of the squared error e^2 of each column in outputs and lookups, float32 [columns].

        They are the diagonal of V H V^T and, with weights on the diagonal of C, that of V C V^T.
        """
        if self._foretold is None or self._foretold[0] is not site or not np.array_equal(self._foretold[1], columns):
            self._foretold = None
            self._foretold = (
                site,
                columns,
                feedback_factor(damped(site.fitted, self._damping, site.fitted_shrinkage)),
                {},
            )
        factor, found = self._foretold[2:]
        if block not in found:
            found[block] = _spread_costs(factor, block, site.held, columns)
        return found[block]

    def _moment_and_factor(self, site: Site) -> tuple[Float32, Float32]:
        """Return damped H and its factor; the last ones are cached, since matrices that share an input are adjacent."""
        if self._last is None or self._last[0] is not site:
            moment = damped(site.second_moment, self._damping, site.shrinkage)
            self._last = site, moment, feedback_factor(moment)
        return self._last[1:]

    def _encode_rows(self, weight: Float32, format: WeightFormat, moment: Float32, factor: Float32) -> Bytes:
        """Encode some rows; columns are stored as rows of memory, since they are visited one by one."""
        importance = np.ascontiguousarray(moment.diagonal())
        columns = np.ascontiguousarray(weight.T)
        size = format.block_columns
        feedback = np.empty_like(columns)
        rounded: list[Bytes | _Block] = []
        panel = size * max(1, PANEL_COLUMNS // size)
        for start in range(0, len(columns), size):
            block, first = slice(start, start + size), start - start % panel
            if start == first:
                # One large product for the feedback of all earlier panels is much faster than one small per block.
                following = slice(first, first + panel)
                ahead = columns[following] - factor[:first, following].T @ feedback[:first]
            left = ahead[start - first :][:size] - factor[first:start, block].T @ feedback[first:start]
            current = np.ascontiguousarray(left.T)
            grid = format.grid(current, importance[block])
            if grid is None:
                data, feedback[block] = _round_block(current, format, factor[block, block], importance[block])
                rounded.append(data)
            else:
                rounded.append(_round_columns(block, left, grid, factor[block, block], feedback[block]))
        blocks = [one for one in rounded if isinstance(one, _Block)]
        if blocks and self._sweeps:
            _descend(columns, blocks, moment, self._sweeps)
        return format.join([one.pack() if isinstance(one, _Block) else one for one in rounded])


@dataclass
class _Block:
    """The codes of a block, uint8 [block columns, rows], its position, and the grid of the codes."""

    columns: slice
    grid: Grid
    codes: Bytes

    def pack(self) -> Bytes:
        """Return the encoded block."""
        return self.grid.pack(np.ascontiguousarray(self.codes.T))


def damped(second_moment: Float32, damping: float, shrinkage: float = 0.0) -> Float32:
    """Return H, regularised to be invertible and not fitted to chance, float32 [columns, columns].

    Args:
        second_moment: H, float32 [columns, columns].
        damping: Added to the diagonal, as a share of its median; at least `LEAST_DAMPING` of its mean.
        shrinkage: Share removed from off-diagonal elements; see `exporter.calibrate.second_moments.Site`.
    """
    diagonal = second_moment.diagonal()
    least = LEAST_DAMPING * diagonal.mean(dtype=np.float64)
    added = max(damping * float(np.median(diagonal)), least) if least > 0 else 1.0
    return shrunk(second_moment, shrinkage, diagonal + np.float32(added))


def feedback_factor(moment: Float32) -> Float32:
    """Return the upper Cholesky factor U of the inverse of H, float32 [columns, columns].

    Computed without inverting H: with the lower Cholesky factor of H in reversed order, P H P = L L^T, the factor
    is U = P L^-1 P.
    """
    inverse = moment[::-1, ::-1].astype(np.float64)
    _invert_factor(inverse)
    return np.ascontiguousarray(inverse[::-1, ::-1], np.float32)


def _invert_factor(moment: NDArray[np.float64]) -> None:
    """Replace a symmetric matrix by the inverse of its lower Cholesky factor, by halves.

    [[P, Q^T], [Q, R]] has the factor [[A, 0], [B, C]], where A A^T = P, B = Q A^-T and C C^T = R - B B^T; its inverse
    is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. This needs no more than one such matrix, and nearly all of the work is matrix
    products. SciPy has both steps too, but with its own BLAS, whose waiting threads slow down NumPy's.
    """
    size = len(moment)
    if size <= WHOLE_FACTOR_COLUMNS:
        moment[:] = np.tril(np.linalg.inv(np.linalg.cholesky(moment)))
        return
    half = size // 2
    first, beside, last = moment[:half, :half], moment[half:, :half], moment[half:, half:]
    _invert_factor(first)
    factor = beside @ first.T
    last -= factor @ factor.T
    _invert_factor(last)
    beside[:] = last @ (factor @ first)
    np.negative(beside, out=beside)
    moment[:half, half:] = 0


def _spread_costs(factor: Float32, block: int, moment: Float32, columns: Float32) -> tuple[Float32, Float32]:
    """Return v H v^T of each row v of V, and the sum of its squares with weights; see `Ldlq._costs`.

    V is upper triangular. It is computed and multiplied in stripes, without the part left of each stripe's diagonal.
    """
    outputs, lookups = np.empty_like(columns), np.empty_like(columns)
    step = block * max(1, STRIPE_COLUMNS // block)
    for first in range(0, len(factor), step):
        stripe = slice(first, first + step)
        spread = factor[stripe, first:] / factor.diagonal()[stripe, None]
        for start in range(0, len(spread) if block > 1 else 0, block):
            rows = slice(start, start + block)
            spread[rows, start:] = np.linalg.inv(spread[rows, rows]) @ spread[rows, start:]
        outputs[stripe] = np.einsum("ij,ij->i", spread @ moment[first:, first:], spread)
        lookups[stripe] = spread**2 @ columns[first:]
    return outputs, lookups


def _round_columns(block: slice, columns: Float32, grid: Grid, factor: Float32, errors: Float32) -> _Block:
    """Round the columns of one block in order; write their errors / U_jj to `errors`, float32 [columns, rows]."""
    codes = np.empty(columns.shape, np.uint8)
    size = grid.part_columns if isinstance(grid, PartedGrid) else COLUMNS_AT_ONCE
    for start in range(0, len(columns), size):
        part = slice(start, start + size)
        left = columns[part] - factor[:start, part].T @ errors[:start]
        feedback = np.ascontiguousarray(factor[part, part].T)
        if isinstance(grid, PartedGrid):
            # Cost of an error after the later columns have compensated for it as well as they can.
            grid = grid.reached(start, left, feedback.diagonal() ** -2)
        for column in range(len(left)):
            values = left[column] - feedback[column, :column] @ errors[start : start + column]
            codes[start + column], rounded = grid.round(start + column, values)
            np.subtract(values, rounded, out=values)
            np.divide(values, feedback[column, column], out=errors[start + column])
    return _Block(block, grid, codes)


def _round_block(block: Float32, format: WeightFormat, factor: Float32, importance: Float32) -> tuple[Bytes, Float32]:
    """Round one block with the reference quantiser; return its code and its errors times U_bb^-1, [columns, rows]."""
    data = format.encode_rows(block, importance)
    difference = block - format.decode_rows(data, block.shape[1])
    return data, np.linalg.inv(factor).T @ difference.T


def _descend(weight: Float32, blocks: list[_Block], moment: Float32, sweeps: int) -> None:
    """Improve scales and codes in place; `weight` is float32 [columns, rows]."""
    error = np.concatenate([block.grid.decode(block.codes) for block in blocks])
    error -= weight
    for _ in range(sweeps):
        for block in blocks:
            _improve(block, weight[block.columns], moment, error)


def _improve(block: _Block, weight: Float32, moment: Float32, error: Float32) -> None:
    """Refit the scales of one block, move its codes, and update `error` = Q - W, float32 [columns, rows]."""
    gram = np.ascontiguousarray(moment[block.columns, block.columns])
    # Half the gradient of tr(D H D^T) at the block's weights q, in which the error is q^T G q - 2 a^T q.
    slope = moment[block.columns] @ error
    now = error[block.columns] + weight
    block.grid = block.grid.refit(block.codes, gram, gram @ now - slope)
    moved = block.grid.decode(block.codes)
    slope += gram @ (moved - now)
    for start in range(0, len(gram), COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        before = moved[part].copy()
        within = np.ascontiguousarray(gram[part, part])
        moves = np.empty_like(before)
        for column in range(len(within)):
            now = slope[start + column] + within[column, :column] @ moves[:column]
            wanted = before[column] - now / within[column, column]
            block.codes[start + column], moved[start + column] = block.grid.round(start + column, wanted)
            np.subtract(moved[start + column], before[column], out=moves[column])
        if start + COLUMNS_AT_ONCE < len(gram):
            slope += gram[:, part] @ moves
    error[block.columns] = moved - weight


def at(effort: Effort) -> Ldlq:
    """Return the method with the settings of an effort."""
    return Ldlq(sweeps=effort.sweeps)
