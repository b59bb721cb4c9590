"""The inputs that each layer has of its own, made of a token by transformers' own module.

They are the token's row of a table, scaled, and a projection of its embedding, normalised, added up. They depend on the
token alone, not on its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from exporter.model.decoder import Decoder
from exporter.model.model import Model

BASE = "model."


class LayerInputMaker:
    """Makes the inputs of all layers.

    Args:
        model: The model.
        module: transformers' module of its decoder, without weights.
    """

    def __init__(self, model: Model, module: nn.Module) -> None:
        self._model, self._module = model, cast(Any, module)

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Hold the weights of the projection and its norm."""
        vectors = self._model.decoder.before_layers
        for vector in vectors:
            path = vector.name.removeprefix(BASE).removesuffix(".weight")
            weight = torch.from_numpy(self._model.read(vector.name))
            self._module.get_submodule(path).load_state_dict({"weight": weight}, assign=True)
        try:
            yield
        finally:
            for vector in vectors:
                self._module.get_submodule(vector.name.removeprefix(BASE).removesuffix(".weight")).to("meta")

    def made(self, embedded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the inputs, float32 [tokens, layers, width]; differentiable.

        Args:
            embedded: Embedded tokens as the first layer takes them, float32 [tokens, hidden].
            rows: Their rows of the table, float32 [tokens, layers * width].
        """
        shape = self._model.decoder
        scaled = rows * self._module.embed_tokens_per_layer.scalar_embed_scale
        looked_up = scaled.view(1, len(rows), shape.layers, shape.layer_input_width)
        found: torch.Tensor = self._module.project_per_layer_inputs(embedded[None], looked_up)[0]
        return found


@contextmanager
def zero_inputs(shape: Decoder, module: nn.Module, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield arguments for a run of a decoder without weights, in which the inputs of layers, if any, are zeros."""
    if not shape.layer_input_width:
        yield {}
        return
    decoder = cast(Any, module)
    decoder.project_per_layer_inputs = lambda embedded, given: given
    try:
        yield {"per_layer_inputs": torch.zeros(1, length, shape.layers, shape.layer_input_width)}
    finally:
        del decoder.project_per_layer_inputs
