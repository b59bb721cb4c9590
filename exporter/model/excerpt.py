"""Reduces a model to a few layers, one of each kind, for checks that need not run a large model in full."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from exporter.formats.format import Float32
from exporter.model.decoder import LAYER_PROJECTION, Decoder
from exporter.model.model import Model
from exporter.model.tensors import HoldsFactors
from exporter.model.widths import stated_width

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
    part = replace(
        decoder,
        layers=len(kept),
        intermediate=_of(kept, decoder.intermediate),
        width_factors=_of(kept, decoder.width_factors),
        head_dims=_of(kept, decoder.head_dims),
        key_layers=tuple(None if one is None else kept.index(one) for one in _of(kept, decoder.key_layers)),
        windows=_of(kept, decoder.windows),
        convolutions=_of(kept, decoder.convolutions),
    )
    return replace(
        model,
        config=_config(model, part, kept),
        decoder=part,
        tensors=_Excerpt(model, kept),
        changes=hashlib.sha256(f"{model.changes}:excerpt".encode()).hexdigest(),
    )


def _config(model: Model, part: Decoder, kept: Sequence[int]) -> PretrainedConfig:
    """Return the config of an excerpt."""
    keys = model.config.to_dict()
    by_layer = {int(layer): own for layer, own in keys.get("per_layer_config", {}).items()}
    if by_layer:
        keys["per_layer_config"] = {kept.index(layer): own for layer, own in by_layer.items() if layer in kept}
    if keys.get("layer_types"):
        keys["layer_types"] = list(_of(kept, keys["layer_types"]))
    if "num_kv_shared_layers" in keys:
        keys["num_kv_shared_layers"] = part.layers - part.key_layers.count(None)
    keys |= {"num_hidden_layers": part.layers, part.family.width_key: stated_width(part)}
    config: PretrainedConfig = type(model.config).from_dict(keys)
    return config


def excerpt_layers(decoder: Decoder) -> tuple[int, ...]:
    """Return the first and the last layer, and others so that each kind of layer is there.

    These are the last with attention, or with a convolution, if both lack it; and, where layers attend to keys and
    values of others, those others and the last layer that attends to each.
    """
    attends = [kernel is None for kernel in decoder.convolutions]
    ends = {0, decoder.layers - 1}
    last = {kind: layer for layer, kind in enumerate(attends)}
    more = {layer for kind, layer in last.items() if kind not in {attends[end] for end in ends}}
    sharing = {other: layer for layer, other in enumerate(decoder.key_layers) if other is not None}
    return tuple(sorted(ends | more | sharing.keys() | set(sharing.values())))


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
        self._source, self._kept, self._layers = model.tensors, kept, model.decoder.layers
        self._axes = {table.name: 1 for table in model.decoder.layer_embedding} | {LAYER_PROJECTION: 0}
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        found = {}
        for name, shape in self._source.shapes().items():
            layer = LAYER.fullmatch(name)
            if name in self._axes:
                axis = self._axes[name]
                one = shape[axis] // self._layers
                found[name] = (*shape[:axis], one * len(self._kept), *shape[axis + 1 :])
            elif layer is None:
                found[name] = shape
            elif int(layer[1]) in self._kept:
                found[f"model.layers.{self._kept.index(int(layer[1]))}.{layer[2]}"] = shape
        return found

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        return self._cut(name, self._source.read(source_name(name, self._kept)))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite; of the projection to layers' inputs none are asked for."""
        return self._cut(name, self._source.read_rows(source_name(name, self._kept), rows))

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of the factors of each matrix that an adapter is kept beside, by its name."""
        given = self._source.ranks() if isinstance(self._source, HoldsFactors) else {}
        places = {name: source_name(name, self._kept) for name in self.shapes()}
        return {name: given[place] for name, place in places.items() if place in given}

    def factors(self, name: str) -> tuple[Float32, Float32]:
        """Return L and R of a matrix of `ranks`."""
        assert isinstance(self._source, HoldsFactors)
        return self._source.factors(source_name(name, self._kept))

    def _cut(self, name: str, values: Float32) -> Float32:
        """Return a tensor with the parts that belong to the layers of the excerpt."""
        if name not in self._axes:
            return values
        axis = self._axes[name]
        parts = np.split(values, self._layers, axis)
        return np.concatenate([parts[layer] for layer in self._kept], axis)
