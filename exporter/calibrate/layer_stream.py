"""Runs the float model with transformers' own modules and one layer's weights in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.calibrate.bf16_matmul import exact_products
from exporter.calibrate.carried_keys import CarriedKeys
from exporter.formats.format import Float32
from exporter.foundation.allocator import give_back_freed_memory
from exporter.foundation.errors import InputError
from exporter.model.blocks import Block
from exporter.model.decoder import layer_prefix
from exporter.model.layer_inputs import LayerInputMaker, zero_inputs
from exporter.model.model import Model
from exporter.model.module import separate, weightless_module

# Tokens per batch of windows: enough for fast matrix products, few enough for small activations.
TOKENS_AT_ONCE = 2048
# What transformers' layers are handed their own inputs in.
LAYER_INPUT = "per_layer_input"
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class LayerInputs:
    """What each layer is given of the tokens of some windows besides hidden states; in most families nothing.

    Attributes:
        rows: By token, float32 [tokens, layers, width]; None for nothing.
        places: The token at each place of the windows, int64 [windows, length].
    """

    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None

    def of(self, layer: int, part: slice) -> torch.Tensor | None:
        """Return the inputs of a layer for some windows, float32 [windows, length, width]; None for none."""
        if self.rows is None or self.places is None:
            return None
        return self.rows[self.places[part], layer]


@dataclass(frozen=True)
class LoadedLayer:
    """A decoder layer with its weights.

    Hidden states have channels beside them where later layers attend to keys and values of earlier ones; see
    `exporter.calibrate.carried_keys`.

    Attributes:
        block: Its description.
        module: transformers' module.
        arguments: Returns what the module takes besides hidden states, for windows of some length.
        carried: The keys and values that pass it.
    """

    block: Block
    module: nn.Module
    arguments: Callable[[int], Mapping[str, Any]]
    carried: CarriedKeys

    def output(self, hidden: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """Return the layer's output, float32 [windows, length, channels].

        Args:
            hidden: Hidden states before it, float32 [windows, length, channels].
            own: The layer's own inputs, float32 [windows, length, width]; None for none.
        """
        arguments = self.arguments(hidden.shape[1])
        return self.carried.run(self.module, hidden, arguments if own is None else {**arguments, LAYER_INPUT: own})

    def room(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return where outputs for hidden states are written: in their place if they have as many channels."""
        width = self.carried.width_after
        return hidden if hidden.shape[-1] == width else torch.empty(*hidden.shape[:-1], width)

    def parts(self, hidden: torch.Tensor) -> Iterator[slice]:
        """Return the slices of windows that run together: one each where experts see some tokens of each only."""
        windows, length, _ = hidden.shape
        step = 1 if any(site.routed for site in self.block.sites) else max(1, TOKENS_AT_ONCE // length)
        return (slice(first, first + step) for first in range(0, windows, step))

    def run(self, hidden: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        """Return the layer's output for hidden states, in batches of windows; they are overwritten if that is possible.

        Args:
            hidden: float32 [windows, length, channels].
            inputs: What the layers are given of the tokens.
        """
        outputs = self.room(hidden)
        for part in self.parts(hidden):
            outputs[part] = self.output(hidden[part], inputs.of(self.block.layer, part))
        return outputs

    def differentiable(
        self, hidden: torch.Tensor, inputs: LayerInputs
    ) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """Yield for each batch of windows: its slice, the layer's output, and what to differentiate by.

        That is the hidden states before the layer, and its own inputs if it has some.
        """
        for part in self.parts(hidden):
            given = hidden[part].clone().requires_grad_()
            own = inputs.of(self.block.layer, part)
            by = [given] if own is None else [given, own.requires_grad_()]
            yield part, self.output(given, own), by


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
        self._maker = LayerInputMaker(model, self._decoder)
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

    def layer_inputs(self, windows: NDArray[np.int64], looked_up: Sequence[Float32] | None = None) -> LayerInputs:
        """Return what the layers are given of tokens besides hidden states.

        Args:
            windows: The tokens, int64 [windows, length].
            looked_up: Rows of each of the decoder's tables, for each token of the windows in ascending order, float32
                [tokens, columns]; None to read them.
        """
        shape = self._model.decoder
        if not shape.layer_input_width:
            return LayerInputs()
        tokens, places = np.unique(windows, return_inverse=True)
        embedded, rows = looked_up or self._model.looked_up(tokens)
        with self._maker.loaded(), torch.no_grad():
            made = self._maker.made(self.scaled(embedded.copy()), torch.from_numpy(rows))
        return LayerInputs(made, torch.from_numpy(places.reshape(windows.shape)))

    def table_gradients(
        self, windows: NDArray[np.int64], at_embedding: torch.Tensor, at_inputs: Sequence[NDArray[np.float32]]
    ) -> list[Float32]:
        """Return E[g^2] of each column of the rows that are looked up in each of the tables, float32 [columns].

        Args:
            windows: The tokens, int64 [windows, length].
            at_embedding: Gradients at the first layer's inputs, float32 [windows, length, hidden].
            at_inputs: Gradients at each layer's own inputs, float32 [windows, length, width]; empty for none.
        """
        shape = self._model.decoder
        sums: list[torch.Tensor | float] = [0.0] * (2 if at_inputs else 1)
        with self._maker.loaded() if at_inputs else nullcontext():
            for tokens, at_first, number in zip(windows, at_embedding, range(len(windows)), strict=True):
                gradients = [at_first]
                if at_inputs:
                    known, places = np.unique(tokens, return_inverse=True)
                    embedded, rows = (found[places] for found in self._model.looked_up(known))
                    by = [self.scaled(embedded).requires_grad_(), torch.from_numpy(rows).requires_grad_()]
                    with torch.enable_grad():
                        made = self._maker.made(*by)
                    at_made = torch.stack([torch.from_numpy(one[number]) for one in at_inputs], 1)
                    through, at_rows = torch.autograd.grad(made, by, at_made)
                    gradients = [at_first + through, at_rows]
                sums = [total + one.square().sum(0) for total, one in zip(sums, gradients, strict=True)]
        sums[0] *= shape.embedding_scale**2
        return [np.asarray(total / windows.size, np.float32) for total in sums]

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
            carried = CarriedKeys(self._model.decoder, index)
            yield LoadedLayer(self._block(index), module, partial(self._arguments_of, index), carried)
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

        def record(hidden: torch.Tensor, *_: Any, **arguments: Any) -> torch.Tensor:
            recorded.append(arguments)
            return hidden

        replaced = [*self._decoder.layers, self._norm]
        for module in replaced:
            module.forward = record
        try:
            shape = self._model.decoder
            with (
                exact_products(), torch.inference_mode(False), torch.no_grad(),
                zero_inputs(shape, self._decoder, length) as more,
            ):  # fmt: skip
                self._decoder(inputs_embeds=torch.zeros(1, length, shape.hidden), use_cache=False, **more)
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


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return logits with a decoder's cap: c tanh(x / c)."""
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)


def check_finite(hidden: torch.Tensor, where: str) -> None:
    """Raise an `InputError` if activations are not finite."""
    if not torch.isfinite(hidden.sum()):
        raise InputError("the activations are not finite", where=where, next_step="check the model's weights there")


@torch.inference_mode()
def hidden_states(stream: LayerStream, windows: NDArray[np.int64], progress: Progress = silent) -> torch.Tensor:
    """Return the normalised hidden states that the head takes, float32 [windows, length, hidden]."""
    hidden = stream.embed(windows)
    inputs = stream.layer_inputs(windows)
    for index in range(stream.layers):
        progress(index, stream.layers)
        with stream.layer(index) as layer:
            hidden = layer.run(hidden, inputs)
        check_finite(hidden, f"layer {index}")
    progress(stream.layers, stream.layers)
    return stream.normalise(hidden)
