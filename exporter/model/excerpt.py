"""Reduces a model to its first and last layer, for checks that need not run a large model in full."""

import hashlib
import re
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.model.model import Model

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Models with more weights are not run in full in float32.
WHOLE_PARAMETERS = 1_000_000_000


def excerpt_if_large(model: Model) -> Model:
    """Return a model of up to a billion weights unchanged, and the `excerpt` of a larger one."""
    return model if model.decoder.parameters <= WHOLE_PARAMETERS else excerpt(model)


def excerpt(model: Model) -> Model:
    """Return a model with only the first and last layer, the embedding, the final norm and the head.

    The layers are renumbered 0 and 1; weights stay lazy. A model of at most two layers is returned unchanged.
    """
    layers = model.decoder.layers
    if layers <= 2:
        return model
    widths = model.decoder.intermediate
    config = model.own_config()
    config.num_hidden_layers = 2
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[0], kinds[-1]]
    setattr(config, model.decoder.family.width_key, max(widths[0], widths[-1]))
    return replace(
        model,
        config=config,
        decoder=replace(
            model.decoder,
            layers=2,
            intermediate=(widths[0], widths[-1]),
            windows=(model.decoder.windows[0], model.decoder.windows[-1]),
        ),
        tensors=_Excerpt(model),
        changes=hashlib.sha256(f"{model.changes}:excerpt".encode()).hexdigest(),
    )


def source_name(name: str, layers: int) -> str:
    """Return the name in the whole model of a tensor of an excerpt.

    Args:
        name: A tensor's name in the excerpt.
        layers: Number of layers of the whole model, more than two.
    """
    found = LAYER.fullmatch(name)
    return f"model.layers.{layers - 1}.{found[2]}" if found and found[1] == "1" else name


class _Excerpt:
    """The tensors of a model's first and last layer, and those outside the layers."""

    def __init__(self, model: Model) -> None:
        self._source, self._layers = model.tensors, model.decoder.layers
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        found = {}
        for name, shape in self._source.shapes().items():
            layer = LAYER.fullmatch(name)
            if layer is None or layer[1] == "0":
                found[name] = shape
            elif int(layer[1]) == self._layers - 1:
                found[f"model.layers.1.{layer[2]}"] = shape
        return found

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        return self._source.read(source_name(name, self._layers))

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        return self._source.read_rows(source_name(name, self._layers), rows)
