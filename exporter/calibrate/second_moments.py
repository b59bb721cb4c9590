"""Running sums over the inputs of matrices, and their form in the cache.

A token is weighted by how much the model's behaviour at this token depends on the outputs of these inputs
(Kim et al. 2025, GuidedQuant, section 3: H = E[g^2 x x^T] instead of E[x x^T]).
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from exporter.formats.format import Float32
from exporter.foundation.cache_entries import ARRAY, VECTORS, Filling, load, require_whole
from exporter.foundation.errors import InputError

# Horizontal stripes of a symmetric sum, each as wide as its last row needs: 5/8 of the work of the full square.
STRIPES = 4
# Numbers of columns that runtimes round activations in; see `Site.peaks`.
ACTIVATION_BLOCKS = (16, 32, 64, 128, 256)
# Every HELD_EVERY-th window is held out from the sums that codes are fitted to, to measure how well they generalise.
HELD_EVERY = 4
ROWS_AT_ONCE = 512
TINY = np.float32(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Site:
    """Statistics of the inputs x of a site; all means but `squares` use the tokens' weights.

    Attributes:
        fitted: E[x x^T] over most windows, float32 [columns, columns].
        held: The same over the held-out windows; equal to `fitted` if there were none.
        share: Fraction of the total weight in held-out windows.
        squares: E[x^2] with equal token weights, float32 [columns]: llama.cpp's importance matrix.
        peaks: Block size -> E[max |x|^2] of each block of columns, float32 [columns / block size].
    """

    fitted: Float32
    held: Float32
    share: float
    squares: Float32
    peaks: dict[int, Float32]

    @cached_property
    def second_moment(self) -> Float32:
        """E[x x^T] over all windows, float32 [columns, columns]."""
        return _mean(self.fitted, self.held, self.share)

    @cached_property
    def shrinkage(self) -> float:
        """Shrinkage of the correlations in `second_moment`, from 0 to 1, for their sampling variance.

        sum_ij Var(r_ij) / sum_ij r_ij^2 over i != j (Schaefer and Strimmer 2005, eq. 10, target D). The variance is
        estimated from the difference between held-out and other windows; 0 if none were held out.
        """
        if self.share in (0.0, 1.0):
            return 0.0
        power = _mean(self.fitted.diagonal(), self.held.diagonal(), self.share)
        scale: Float32 = np.reciprocal(np.sqrt(np.maximum(power, TINY)))
        noise = size = 0.0
        for first in range(0, len(scale), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            fitted, held = self.fitted[rows], self.held[rows]
            noise += _correlated(held - fitted, scale, rows)
            size += _correlated(_mean(fitted, held, self.share), scale, rows)
        return min(1.0, self.share * (1 - self.share) * noise / max(size, 1e-30))

    @property
    def fitted_shrinkage(self) -> float:
        """The same for `fitted`, a mean over fewer windows."""
        return min(1.0, self.shrinkage / (1 - self.share)) if self.share < 1 else 0.0


def _mean(fitted: Float32, held: Float32, share: float) -> Float32:
    """Return the mean over all windows from the means over the fitted and the held-out windows."""
    mean: Float32 = fitted + np.float32(share) * (held - fitted)
    return mean


def _correlated(stripe: Float32, scale: Float32, rows: slice) -> float:
    """Return the off-diagonal sum of squares of some rows, float32 [rows, columns], with rows and columns scaled."""
    scaled = stripe * scale
    scaled *= scale[rows, None]
    scaled[:, rows][np.diag_indices(len(scaled))] = 0
    return float(np.vdot(scaled, scaled))


def shrunk(moment: Float32, shrinkage: float, diagonal: Float32) -> Float32:
    """Return a moment with its off-diagonal elements shrunk and its diagonal replaced."""
    made = moment * np.float32(1 - shrinkage)
    made[np.diag_indices_from(made)] = diagonal
    return made


def add_products(total: torch.Tensor, rows: torch.Tensor, scale: float = 1.0) -> None:
    """Add the scaled sum of x x^T over rows x to a square matrix; the upper triangle is only partly updated.

    Args:
        total: float32 [columns, columns].
        rows: float32 [rows, columns].
        scale: Factor of the sum.
    """
    step = -(-len(total) // STRIPES)
    for first in range(0, len(total), step):
        last = first + step
        total[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last], alpha=scale)


class _Moment:
    """A weighted sum of x x^T; only the lower triangle is valid."""

    def __init__(self, columns: int) -> None:
        self._total = torch.zeros(columns, columns)
        self.weight = 0.0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Add inputs, float32 [tokens, columns], with weights, float32 [tokens]."""
        if not len(inputs):
            return
        add_products(self._total, inputs * weights.sqrt()[:, None])
        self.weight += float(weights.sum(dtype=torch.float64))

    def add_all(self, other: "_Moment") -> None:
        """Add another sum."""
        self._total += other._total
        self.weight += other.weight

    def mean(self) -> Float32:
        """Return E[x x^T]; only the lower triangle is valid."""
        total = self._total.numpy()
        if self.weight > 0:
            total /= self.weight
        return total


class Moments:
    """Running sums over the inputs of one site.

    Attributes:
        tokens: Number of inputs.
    """

    def __init__(self, columns: int) -> None:
        self._fitted, self._held = _Moment(columns), _Moment(columns)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._peaks = {block: torch.zeros(columns // block) for block in ACTIVATION_BLOCKS if columns % block == 0}
        self.tokens = 0

    def add(self, inputs: torch.Tensor, weights: torch.Tensor, first_window: int) -> None:
        """Add some windows.

        Args:
            inputs: float32 [windows, length, columns].
            weights: float32 [windows, length], at least 0, about 1 on average.
            first_window: Number of the first of these windows; every `HELD_EVERY`th is held out.
        """
        numbers = torch.arange(first_window, first_window + len(inputs))
        held = numbers % HELD_EVERY == HELD_EVERY - 1
        for moment, chosen in ((self._fitted, ~held), (self._held, held)):
            moment.add(inputs[chosen].flatten(0, 1), weights[chosen].flatten())
        largest, every = inputs.flatten(0, 1).square(), weights.flatten()
        self._squares += largest.sum(0)
        size = 1
        for block, total in self._peaks.items():
            largest = largest.reshape(len(every), -1, block // size).amax(-1)
            size = block
            total.addmv_(largest.T, every)
        self.tokens += len(every)

    def add_all(self, other: "Moments") -> None:
        """Add the inputs of another site."""
        self._fitted.add_all(other._fitted)
        self._held.add_all(other._held)
        self._squares += other._squares
        self._peaks = {block: total + other._peaks[block] for block, total in self._peaks.items()}
        self.tokens += other.tokens

    def copy(self) -> "Moments":
        """Return the same sums, to be saved by themselves."""
        made = Moments(len(self._squares))
        made.add_all(self)
        return made

    def save(self, folder: Filling, site: str) -> None:
        """Write the means under the site's name; this destroys the sums.

        Two symmetric matrices share one square: the fitted one on and below the diagonal, the held-out one above it.
        The held-out diagonal is stored separately.

        Raises:
            InputError: they are not finite.
        """
        both, held = self._fitted.mean(), self._held.mean()
        total = self._fitted.weight + self._held.weight
        _mirror(held, both)
        vectors: dict[str, np.ndarray] = {
            "held_diagonal": held.diagonal().copy(),
            "share": np.array(self._held.weight / total if total > 0 else 0.0),
            "squares": (self._squares / max(self.tokens, 1)).float().numpy(),
        } | {f"peaks_{block}": (peaks / max(total, 1e-30)).numpy() for block, peaks in self._peaks.items()}
        if not np.isfinite(both).all() or not all(np.isfinite(values).all() for values in vectors.values()):
            raise InputError("the activations are not finite", where=site, next_step="check the model's weights there")
        folder.save(f"{site}.npz", VECTORS, vectors)
        folder.save(f"{site}.npy", ARRAY, both)


def load_site(folder: Path, site: str) -> Site | None:
    """Return the saved statistics of a site, or None if its inputs were not observed."""
    path = folder / f"{site}.npy"
    if not path.is_file():
        return None
    fitted = load(path, ARRAY)
    vectors = load(folder / f"{site}.npz", VECTORS)
    share = float(vectors["share"])
    peaks = {block: vectors[f"peaks_{block}"] for block in ACTIVATION_BLOCKS if f"peaks_{block}" in vectors}
    held = fitted
    if share > 0:
        held = fitted.T.copy()
        _mirror(held, held)
        held[np.diag_indices_from(held)] = vectors["held_diagonal"]
    _mirror(fitted, fitted)
    return Site(fitted, held, share, vectors["squares"], peaks)


def load_power(folder: Path, site: str) -> Float32 | None:
    """Return only the diagonal of `Site.second_moment`, float32 [columns]; None if not observed."""
    path = folder / f"{site}.npy"
    if not path.is_file():
        return None
    require_whole(path)
    fitted = np.array(np.load(path, mmap_mode="r", allow_pickle=False).diagonal())
    vectors = load(folder / f"{site}.npz", VECTORS)
    share = float(vectors["share"])
    return _mean(fitted, vectors["held_diagonal"], share) if share > 0 else fitted


def _mirror(source: Float32, target: Float32) -> None:
    """Write the transposed lower triangle of one square matrix to the upper triangle of another, stripe by stripe."""
    for first in range(0, len(source), ROWS_AT_ONCE):
        stripe = slice(first, first + ROWS_AT_ONCE)
        target[:first, stripe] = source[stripe, :first].T
        square = source[stripe, stripe]
        target[stripe, stripe] = np.tril(target[stripe, stripe]) + np.tril(square, -1).T
