"""Changes the feed-forward widths of a model: removes channels or adds zero channels.

Channel c of a gated feed-forward part, down(act(gate x) * up x), is row c of gate and up and column c of down.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.model.decoder import Decoder
from exporter.model.model import Model, digest_files

Channels = NDArray[np.int64]
COLUMNS = 1


def selected(model: Model, kept: Sequence[Channels], down: Mapping[int, Path]) -> Model:
    """Return the model with a subset of the channels of each feed-forward part; weights stay lazy.

    Args:
        model: The source.
        kept: For each layer the channels to keep, ascending, int64 [width].
        down: Layer -> .npy file of a `down` matrix that replaces the source's columns, float32 [hidden, width].
    """

    def read(name: str, layer: int, axis: int) -> Float32:
        if axis == COLUMNS and layer in down:
            given: Float32 = np.load(down[layer], allow_pickle=False)
            return given
        return np.ascontiguousarray(model.read(name).take(kept[layer], axis))

    total = hashlib.sha256(f"{model.changes}:selected:{digest_files(list(down.values()))}".encode())
    for channels in kept:
        total.update(f"{len(channels)}:".encode() + channels.astype("<i8").tobytes())
    return _rewidened(model, [len(channels) for channels in kept], read, total.hexdigest())


def outlined(model: Model, widths: Sequence[int]) -> Model:
    """Return the model with the first channels of each layer, as a stand-in for any choice of the same widths."""
    return selected(model, [np.arange(width) for width in widths], {})


def padded(model: Model) -> Model:
    """Return the model with zero channels added, so that config.json can state the widths; outputs stay equal.

    In most families, all layers are then as wide as the widest.
    """
    factors = model.decoder.width_factors
    base = stated_width(model.decoder)
    widths = [times * base for times in factors]

    def read(name: str, layer: int, axis: int) -> Float32:
        values = model.read(name)
        more = [(0, 0), (0, 0)]
        more[axis] = 0, widths[layer] - values.shape[axis]
        return np.pad(values, more)

    changes = hashlib.sha256(f"{model.changes}:padded".encode()).hexdigest()
    return _rewidened(model, widths, read, changes)


def stated_width(decoder: Decoder) -> int:
    """Return the least width for config.json with which no layer is wider than it says."""
    return max(-(-width // times) for width, times in zip(decoder.intermediate, decoder.width_factors, strict=True))


# Reads a feed-forward tensor: name, layer, and the axis of its channels.
_Read = Callable[[str, int, int], Float32]


def _rewidened(model: Model, widths: Sequence[int], read: _Read, changes: str) -> Model:
    decoder = model.decoder.with_widths(widths)
    config = model.own_config()
    # transformers has one width for all layers: see `exporter.model.module`.
    setattr(config, decoder.family.width_key, stated_width(decoder))
    places = {
        name: (block.layer, axis)
        for block in decoder.blocks
        if block.channels is not None
        for name, axis in block.channels.axes.items()
    }
    shapes = {group.name: (group.rows, group.columns) for group in decoder.groups() if group.name in places}
    tensors = _Rewidened(model, shapes, places, read)
    return replace(model, config=config, decoder=decoder, tensors=tensors, changes=changes)


class _Rewidened:
    """The tensors of a model, with those of its feed-forward parts made on reading."""

    def __init__(
        self, model: Model, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]], read: _Read
    ) -> None:
        self._source, self._shapes, self._places, self._read = model.tensors, shapes, places, read
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        return {**self._source.shapes(), **self._shapes}

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        return self._read(name, *self._places[name]) if name in self._places else self._source.read(name)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        return self.read(name)[rows] if name in self._places else self._source.read_rows(name, rows)
