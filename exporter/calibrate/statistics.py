"""What the inputs of the matrices look like: second moments, collected layer by layer and kept in the cache.

For a matrix W that multiplies inputs x, the output error of a change D is E|Dx|^2 = tr(D H D^T) with H = E[x x^T],
so H weighs every error of W (Hassibi and Stork 1993; Frantar et al. 2022, eq. 2). Its diagonal is llama.cpp's
importance matrix.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.cache import cache_folder, replacing, save_array
from exporter.calibrate.layers import LayerStream, Progress, check_finite
from exporter.calibrate.ranges import ChannelRanges, load_ranges, observed_ranges, save_head_ranges
from exporter.calibrate.text import Windows
from exporter.errors import InputError
from exporter.model.families import LINEARS
from exporter.model.model import Model
from exporter.weights.format import Float32

VERSION = 3
HEAD_SITE = "head_in"
# Horizontal stripes of a symmetric sum, each as wide as its last row needs: 5/8 of the work of the whole square.
STRIPES = 4


class Statistics:
    """Second moments by site, and ranges by place, in files of a cache folder; read when asked for.

    A site is where the input of one or more matrices is observed: `layers.3.mlp_in`, `head_in`. The embedding's
    input is the token itself, so an untied embedding has none.
    """

    def __init__(self, folder: Path, tokens: int) -> None:
        self._folder = folder
        self._last: tuple[str, Float32] | None = None
        self.tokens = tokens

    def second_moment(self, site: str) -> Float32 | None:
        """Return H = E[x x^T], float32 [columns, columns]; None for a site that was not observed.

        The last one read is kept: asked for again, it is the same array.
        """
        path = self._folder / f"{site}.npy"
        if not path.is_file():
            return None
        if self._last is None or self._last[0] != site:
            self._last = site, np.load(path, allow_pickle=False)
        return self._last[1]

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] of every column, float32 [columns]; None for a site that was not observed."""
        path = self._folder / f"{site}.npy"
        if not path.is_file():
            return None
        return np.ascontiguousarray(np.load(path, mmap_mode="r", allow_pickle=False).diagonal())

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges of a site or of `exporter.calibrate.ranges.output_place`; None where not observed."""
        return load_ranges(self._folder, place)


def statistics_key(model: Model, windows: Windows) -> str:
    """Return the cache key of the statistics of a model on a text."""
    return hashlib.sha256(f"{VERSION}:{model.digest}:{windows.digest}".encode()).hexdigest()[:32]


@torch.inference_mode()
def collect(model: Model, windows: Windows, progress: Progress) -> Statistics:
    """Run the float model over the windows and return the second moments of every matrix's inputs.

    Layers that an interrupted run finished are not run again.

    Args:
        model: The model.
        windows: The calibration text.
        progress: Called with layers done and their total.

    Raises:
        InputError: activations are not finite, or a channel of the input is never used (named by layer).
    """
    folder = cache_folder("statistics", statistics_key(model, windows))
    statistics = Statistics(folder, windows.tokens.size)
    if (folder / f"{HEAD_SITE}.npy").is_file():
        return statistics
    stream = LayerStream(model)
    first, hidden = _resume(folder, stream, windows)
    for index in range(first, stream.layers):
        progress(index, stream.layers)
        with (
            stream.layer(index) as module,
            _observed(module, index, folder),
            observed_ranges(module, index, folder),
        ):
            stream.run(module, hidden)
        check_finite(hidden, f"layer {index}")
        _checkpoint(folder, index + 1, hidden)
    normalised = stream.normalise(hidden)
    save_head_ranges(normalised, stream.head(), folder, HEAD_SITE)
    head = _Moment(hidden.shape[-1])
    head.add(normalised)
    head.save(folder, HEAD_SITE)
    (folder / "checkpoint.npz").unlink(missing_ok=True)
    progress(stream.layers, stream.layers)
    return statistics


def _resume(folder: Path, stream: LayerStream, windows: Windows) -> tuple[int, torch.Tensor]:
    path = folder / "checkpoint.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as saved:
            return int(saved["layers"]), torch.from_numpy(saved["hidden"])
    return 0, stream.embed(windows.tokens)


def _checkpoint(folder: Path, layers: int, hidden: torch.Tensor) -> None:
    with replacing(folder / "checkpoint.npz") as partial, partial.open("wb") as file:
        np.savez(file, layers=np.array(layers), hidden=hidden.numpy())


class _Moment:
    """A running sum of x x^T over the inputs of one module; only what lies on and left of the diagonal is summed."""

    def __init__(self, columns: int) -> None:
        self._total = torch.zeros(columns, columns)
        self._count = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add inputs, float32 [..., columns]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        step = -(-len(self._total) // STRIPES)
        for first in range(0, len(self._total), step):
            last = first + step
            self._total[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])
        self._count += len(rows)

    def save(self, folder: Path, site: str) -> None:
        """Write E[x x^T] under the site's name."""
        mean = self._total.numpy()
        mean /= self._count
        for row in range(len(mean)):
            mean[row, row + 1 :] = mean[row + 1 :, row]
        if not np.isfinite(mean).all():
            raise InputError("the activations are not finite", where=site, next_step="check the model's weights there")
        save_array(folder / f"{site}.npy", mean)


@contextmanager
def _observed(module: nn.Module, layer: int, folder: Path) -> Iterator[None]:
    """Sum the second moments of the inputs of a layer's matrices while it runs, then save them."""
    observers = {site: path for path, site in reversed(LINEARS.values())}
    moments = {site: _Moment(int(module.get_parameter(f"{path}.weight").shape[1])) for site, path in observers.items()}
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, moment=moments[site]: moment.add(inputs[0])
        )
        for site, path in observers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for site, moment in moments.items():
        moment.save(folder, f"layers.{layer}.{site}")
