"""Reduces a model to a few layers, one of each kind, for checks that need not run a large model in full."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.model.decoder import Decoder
from exporter.model.model import Model

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Models with more weights are not run in full in float32.
WHOLE_PARAMETERS = 1_000_000_000
OfLayer = TypeVar("OfLayer")


def excerpt_if_large(model: Model) -> Model:
    """Return a model of up to a billion weights unchanged, and the `excerpt` of a larger one."""
    return model if model.decoder.parameters <= WHOLE_PARAMETERS else excerpt(model)


def excerpt(model: Model) -> Model:
    """Return a model with only the layers of `excerpt_layers`, the embedding, the final norm and the head.

    The layers are renumbered from 0; weights stay lazy. A model of no other layers is returned unchanged.
    """
    decoder, kept = model.decoder, excerpt_layers(model.decoder)
    if len(kept) == decoder.layers:
        return model
    widths = _of(kept, decoder.intermediate)
    config = model.own_config()
    config.num_hidden_layers = len(kept)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = list(_of(kept, kinds))
    setattr(config, decoder.family.width_key, max(widths))
    return replace(
        model,
        config=config,
        decoder=replace(
            decoder,
            layers=len(kept),
            intermediate=widths,
            windows=_of(kept, decoder.windows),
            convolutions=_of(kept, decoder.convolutions),
        ),
        tensors=_Excerpt(model, kept),
        changes=hashlib.sha256(f"{model.changes}:excerpt".encode()).hexdigest(),
    )


def excerpt_layers(decoder: Decoder) -> tuple[int, ...]:
    """Return the first and the last layer, and the last with attention, or with a convolution, if both lack it."""
    attends = [kernel is None for kernel in decoder.convolutions]
    ends = {0, decoder.layers - 1}
    last = {kind: layer for layer, kind in enumerate(attends)}
    return tuple(sorted(ends | {layer for kind, layer in last.items() if kind not in {attends[end] for end in ends}}))


def source_name(name: str, kept: Sequence[int]) -> str:
    """Return the name in the whole model of a tensor of an excerpt.

    Args:
        name: A tensor's name in the excerpt.
        kept: The layers of the whole model that the excerpt has.
    """
    found = LAYER.fullmatch(name)
    return f"model.layers.{kept[int(found[1])]}.{found[2]}" if found else name


def _of(kept: Sequence[int], by_layer: Sequence[OfLayer]) -> tuple[OfLayer, ...]:
    return tuple(by_layer[layer] for layer in kept)


class _Excerpt:
    """The tensors of some of a model's layers, and those outside the layers."""

    def __init__(self, model: Model, kept: Sequence[int]) -> None:
        self._source, self._kept = model.tensors, kept
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        found = {}
        for name, shape in self._source.shapes().items():
            layer = LAYER.fullmatch(name)
            if layer is None:
                found[name] = shape
            elif int(layer[1]) in self._kept:
                found[f"model.layers.{self._kept.index(int(layer[1]))}.{layer[2]}"] = shape
        return found

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        return self._source.read(source_name(name, self._kept))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        return self._source.read_rows(source_name(name, self._kept), rows)
