"""Runs the float model with transformers' own modules and one layer's weights in memory at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.calibrate.bf16_matmul import exact_products
from exporter.foundation.allocator import give_back_freed_memory
from exporter.foundation.errors import InputError
from exporter.model.families import EMBEDDING, FINAL_NORM, HEAD, layer_tensor
from exporter.model.model import Model
from exporter.model.module import weightless_module

# Tokens per batch of windows: enough for fast matrix products, few enough for small activations.
TOKENS_AT_ONCE = 2048
Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


class LayerStream:
    """A decoder whose layers are loaded, run and dropped in turn.

    Hidden states and token windows are [windows, length, ...]; all computation is float32.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        skeleton = weightless_module(model)
        self._decoder = cast(Any, skeleton.model)
        # The buffers of the rotary embedding follow from the config.
        self._rotary = type(self._decoder.rotary_emb)(skeleton.config)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self._model.architecture.layers

    def embed(self, windows: NDArray[np.int64]) -> torch.Tensor:
        """Return the embedded tokens, float32 [windows, length, hidden]."""
        table = self._model.read(EMBEDDING)
        return torch.from_numpy(table[windows])

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Load one decoder layer, and free its weights on exit."""
        module: nn.Module = self._decoder.layers[index]
        state = {name: torch.from_numpy(self._model.read(layer_tensor(index, name))) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        try:
            yield module
        finally:
            module.to("meta")
            give_back_freed_memory()

    def run(self, module: nn.Module, hidden: torch.Tensor) -> None:
        """Replace hidden states, float32 [windows, length, hidden], by a layer's output, in batches of windows."""
        for part in parts(hidden):
            hidden[part] = self._output(module, hidden[part])

    def differentiable(
        self, module: nn.Module, hidden: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield for each batch of windows: its slice, the layer's output, and the input to differentiate by."""
        for part in parts(hidden):
            given = hidden[part].clone().requires_grad_()
            yield part, self._output(module, given), given

    def attended(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input of a layer's output projection, float32 [windows, length, columns], from `hidden`."""
        attention: Any = module.get_submodule("self_attn")
        projection, attention.o_proj = attention.o_proj, nn.Identity()
        try:
            normalised = module.get_submodule("input_layernorm")(hidden)
            attended: torch.Tensor = attention(normalised, attention_mask=None, **self._where(hidden))[0]
        finally:
            attention.o_proj = projection
        return attended

    def _where(self, hidden: torch.Tensor) -> dict[str, Any]:
        """Return the position arguments of a layer."""
        positions = torch.arange(hidden.shape[1])[None]
        with exact_products():
            return {"position_ids": positions, "position_embeddings": self._rotary(hidden[:1], positions)}

    def _output(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = module(hidden, attention_mask=None, use_cache=False, **self._where(hidden))
        return output

    def normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the head's input: the last layer's output after the final norm."""
        norm = self._decoder.norm
        norm.load_state_dict({"weight": torch.from_numpy(self._model.read(FINAL_NORM))}, assign=True)
        normalised: torch.Tensor = norm(hidden)
        return normalised

    def head(self) -> torch.Tensor:
        """Return the head's matrix, float32 [vocab, hidden]."""
        return torch.from_numpy(self._model.read(EMBEDDING if self._model.architecture.tied else HEAD))


def parts(hidden: torch.Tensor) -> Iterator[slice]:
    """Return the slices of windows that run together."""
    windows, length, _ = hidden.shape
    step = max(1, TOKENS_AT_ONCE // length)
    return (slice(first, first + step) for first in range(0, windows, step))


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
        with stream.layer(index) as module:
            stream.run(module, hidden)
        check_finite(hidden, f"layer {index}")
    progress(stream.layers, stream.layers)
    return stream.normalise(hidden)
