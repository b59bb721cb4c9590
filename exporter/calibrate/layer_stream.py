"""Runs the float model with transformers' own modules and one layer's weights in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.calibrate.bf16_matmul import exact_products
from exporter.formats.format import Float32
from exporter.foundation.allocator import give_back_freed_memory
from exporter.foundation.errors import InputError
from exporter.model.blocks import Block
from exporter.model.decoder import layer_prefix
from exporter.model.model import Model
from exporter.model.module import separate, weightless_module

# Tokens per batch of windows: enough for fast matrix products, few enough for small activations.
TOKENS_AT_ONCE = 2048
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer with its weights.

    Attributes:
        block: Its description.
        module: transformers' module.
        arguments: Returns what the module takes besides hidden states, for windows of some length.
    """

    block: Block
    module: nn.Module
    arguments: Callable[[int], Mapping[str, Any]]

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, float32 [windows, length, hidden], for hidden states of the same shape."""
        output: torch.Tensor = self.module(hidden, **self.arguments(hidden.shape[1]))
        return output

    def parts(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Return the slices of windows that run together: one each where experts see some tokens of each only."""
        windows, length, _ = hidden.shape
        step = 1 if any(site.routed for site in self.block.sites) else max(1, TOKENS_AT_ONCE // length)
        return (slice(first, first + step) for first in range(0, windows, step))

    def run(self, hidden: torch.Tensor) -> None:
        """Replace hidden states, float32 [windows, length, hidden], by the layer's output, in batches of windows."""
        for part in self.parts(hidden):
            hidden[part] = self.output(hidden[part])

    def differentiable(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield for each batch of windows: its slice, the layer's output, and the input to differentiate by."""
        for part in self.parts(hidden):
            given = hidden[part].clone().requires_grad_()
            yield part, self.output(given), given


class LayerStream:
    """A decoder whose layers are loaded, run and dropped in turn.

    Hidden states and token windows are [windows, length, ...]; all computation is float32.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        skeleton = weightless_module(model)
        self._decoder = cast(Any, skeleton.model)
        self._norm: nn.Module = self._decoder.get_submodule(model.decoder.family.final_norm)
        for block, layer in zip(model.decoder.blocks, self._decoder.layers, strict=True):
            separate(layer, block)
        if self._decoder.rotary_emb is not None:
            # The buffers of the rotary embedding follow from the config.
            self._decoder.rotary_emb = type(self._decoder.rotary_emb)(skeleton.config)
        self._arguments: dict[int, list[Mapping[str, Any]]] = {}

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self._model.decoder.layers

    def embed(self, windows: NDArray[np.int64]) -> torch.Tensor:
        """Return the embedded tokens, float32 [windows, length, hidden]."""
        return self.scaled(self._model.read(self._model.decoder.embedding.name)[windows])

    def scaled(self, rows: Float32) -> torch.Tensor:
        """Return rows of the embedding as the first layer takes them; they are changed."""
        rows *= np.float32(self._model.decoder.embedding_scale)
        return torch.from_numpy(rows)

    @contextmanager
    def layer(self, index: int, like: LoadedLayer | None = None) -> Iterator[LoadedLayer]:
        """Load one decoder layer, and free its weights on exit.

        Args:
            index: Its index.
            like: The same layer of another stream, whose weights are used, not copied; None to read them.
        """
        module: nn.Module = self._decoder.layers[index]
        if like is None:
            names = {f"{linear.module}.weight": linear.group.name for linear in self._block(index).linears.values()}
            names = {name: names.get(name, f"{layer_prefix(index)}{name}") for name in module.state_dict()}
            state = {name: torch.from_numpy(self._model.read(stored)) for name, stored in names.items()}
        else:
            state = like.module.state_dict()
        module.load_state_dict(state, assign=True)
        try:
            yield LoadedLayer(self._block(index), module, partial(self._arguments_of, index))
        finally:
            module.to("meta")
            give_back_freed_memory()

    def _block(self, index: int) -> Block:
        return self._model.decoder.blocks[index]

    def _arguments_of(self, index: int, length: int) -> Mapping[str, Any]:
        if length not in self._arguments:
            self._arguments[length] = self._recorded_arguments(length)
        return self._arguments[length][index]

    def _recorded_arguments(self, length: int) -> list[Mapping[str, Any]]:
        """Return what transformers' own model passes to each layer: positions, rotary tables, masks.

        The model runs on zeros, with its layers and its final norm passing on what they are given.
        """
        recorded: list[Mapping[str, Any]] = []

        def record(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
            recorded.append(arguments)
            return hidden

        replaced = [*self._decoder.layers, self._norm]
        for module in replaced:
            module.forward = record
        try:
            with exact_products(), torch.inference_mode(False), torch.no_grad():
                self._decoder(inputs_embeds=torch.zeros(1, length, self._model.decoder.hidden), use_cache=False)
        finally:
            for module in replaced:
                del module.forward
        return recorded[: self.layers]

    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the head's input: the last layer's output after the final norm."""
        gain = self._model.read(self._model.decoder.final_norm.name)
        self._norm.load_state_dict({"weight": torch.from_numpy(gain)}, assign=True)
        normalised: torch.Tensor = self._norm(hidden)
        return normalised

    @property
    def logits_divisor(self) -> float:
        """What the head's outputs are divided by."""
        return self._model.decoder.logits_divisor

    def head(self) -> torch.Tensor:
        """Return the head's matrix, float32 [vocab, hidden]."""
        return torch.from_numpy(self._model.read(self._model.decoder.head.name))


# What the module of a matrix returns: its product, or a router's with what follows from it.
Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def first_output(made: Outputs) -> torch.Tensor:
    """Return the product of a module's input and its matrix."""
    return made if isinstance(made, torch.Tensor) else made[0]


def as_windows(values: torch.Tensor) -> torch.Tensor:
    """Return values as [windows, length, channels]; routers are given one window, as [length, channels]."""
    return values if values.dim() == 3 else values[None]


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Raise an `InputError` if activations are not finite."""
    if not torch.isfinite(hidden.sum()):
        raise InputError("the activations are not finite", where=where, next_step="check the model's weights there")


@torch.inference_mode()
def hidden_states(stream: LayerStream, windows: NDArray[np.int64], progress: Progress = silent) -> torch.Tensor:
    """Return the normalised hidden states that the head takes, float32 [windows, length, hidden]."""
    hidden = stream.embed(windows)
    for index in range(stream.layers):
        progress(index, stream.layers)
        with stream.layer(index) as layer:
            layer.run(hidden)
        check_finite(hidden, f"layer {index}")
    progress(stream.layers, stream.layers)
    return stream.normalise(hidden)
