"""LDLQ with any rounder of a few columns at a time, as in QuIP# (Tseng et al. 2024, section 4.1).

`exporter.compress.methods.ldlq` does the same for formats with a scale per block; here the matrix has one scale.
"""

from collections.abc import Callable

import numpy as np

from exporter.compress.lowrank import weighted_error
from exporter.formats.format import Float32


class BlockLdlq:
    """Error feedback from the last block of columns to the first, then descent from block to block.

    Args:
        moment: H, float32 [columns, columns], positive definite.
        width: Columns of a block.
        polish: Passes of descent.
    """

    def __init__(self, moment: Float32, width: int, polish: int) -> None:
        self._moment, self._width, self._polish = moment, width, polish
        lower = np.linalg.cholesky(moment.astype(np.float64))
        for block in self._blocks():
            lower[:, block] = lower[:, block] @ np.linalg.inv(lower[block, block])
        # H = F D F^T, F lower triangular with unit blocks.
        self._spread = lower.astype(np.float32)

    def _blocks(self) -> list[slice]:
        """Return the blocks, the last first."""
        starts = range(len(self._moment) - self._width, -1, -self._width)
        return [slice(start, start + self._width) for start in starts]

    def __call__(self, weight: Float32, round: Callable[[Float32], Float32]) -> Float32:
        """Return rounded weights, float32 [rows, columns].

        Args:
            weight: float32 [rows, columns].
            round: Rounds float32 [rows, width].
        """
        columns = np.ascontiguousarray(weight.T)
        rounded = self._fed_back(columns, round)
        return np.ascontiguousarray(self._polished(columns, rounded, round).T)

    def _fed_back(self, columns: Float32, round: Callable[[Float32], Float32]) -> Float32:
        rounded, errors = np.empty_like(columns), np.zeros_like(columns)
        for block in self._blocks():
            after = slice(block.stop, None)
            wanted = columns[block] + self._spread[after, block].T @ errors[after]
            rounded[block] = round(np.ascontiguousarray(wanted.T)).T
            errors[block] = columns[block] - rounded[block]
        return rounded

    def _polished(self, columns: Float32, rounded: Float32, round: Callable[[Float32], Float32]) -> Float32:
        """Round every block again with all others fixed; the best result of all passes is kept."""
        best, current = rounded, rounded.copy()
        least = weighted_error((best - columns).T, self._moment)
        left = columns - current
        for _ in range(self._polish):
            for block in self._blocks():
                step = np.linalg.solve(self._moment[block, block], self._moment[block] @ left)
                moved = round(np.ascontiguousarray((current[block] + step).T)).T
                left[block] += current[block] - moved
                current[block] = moved
            error = weighted_error(left.T, self._moment)
            if error < least:
                best, least = current.copy(), error
        return best
