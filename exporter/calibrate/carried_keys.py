"""Keys and values that later layers attend to, carried from layer to layer as channels beside the hidden states.

A state of the stream is [windows, length, hidden + channels]. A layer takes the state, and returns it with the keys and
values of its own if a later layer attends to them, and without those that none does. They are handed over, stored and
differentiated as hidden states are, so a gradient reaches a layer's keys and values from every layer that attends to
them, and nothing is approximated.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from exporter.model.shape import Shape

# What transformers' layers are handed keys and values in.
SHARED = "shared_kv_states"
_Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class CarriedKeys:
    """What passes one layer.

    Attributes:
        shape: Sizes of the decoder.
        layer: The layer's index.
    """

    shape: Shape
    layer: int

    def run(
        self, module: Callable[..., torch.Tensor], state: torch.Tensor, arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """Return the state after the layer, float32 [windows, length, hidden + channels].

        Args:
            module: transformers' module of the layer.
            state: The state before it.
            arguments: What the module takes besides hidden states.
        """
        if SHARED not in arguments:
            return module(state, **arguments)
        before, after = self.shape.carried(self.layer), self.shape.carried(self.layer + 1)
        hidden, *parts = torch.split(state, [self.shape.hidden, *map(self._channels, before)], -1)
        carried = dict(zip(before, parts, strict=True))
        other = self.shape.key_layers[self.layer]
        shared = _Shared(None if other is None else self._unpacked(carried[other], other))
        made = module(hidden, **{**arguments, SHARED: shared})
        if self.layer in after:
            assert shared.made is not None
            carried[self.layer] = torch.cat([one.transpose(1, 2).flatten(2) for one in shared.made], -1)
        return torch.cat([made, *(carried[one] for one in after)], -1) if after else made

    @property
    def width_after(self) -> int:
        """Channels of the state after the layer."""
        return self.shape.hidden + sum(map(self._channels, self.shape.carried(self.layer + 1)))

    def _channels(self, layer: int) -> int:
        return 2 * self.shape.kv_heads * self.shape.head_dims[layer]

    def _unpacked(self, channels: torch.Tensor, layer: int) -> _Pair:
        """Return the keys and the values of a layer, each [windows, heads, length, width]."""
        split = channels.reshape(*channels.shape[:2], 2, self.shape.kv_heads, self.shape.head_dims[layer])
        keys, values = split.unbind(2)
        return keys.transpose(1, 2), values.transpose(1, 2)


def state_width(shape: Shape, layer: int) -> int:
    """Return the channels of the state that a layer takes; of the number of layers, those of what the last makes."""
    return shape.hidden if layer == 0 else CarriedKeys(shape, layer - 1).width_after


def widest_state(shape: Shape) -> int:
    """Return the most channels that a state has."""
    return max(state_width(shape, layer) for layer in range(shape.layers + 1))


class _Shared(UserDict[str, _Pair]):
    """What transformers' layer looks keys and values up in, or puts its own into; it names them by their kind."""

    def __init__(self, given: _Pair | None) -> None:
        super().__init__()
        self._given = given
        self.made: _Pair | None = None

    def __getitem__(self, kind: str) -> _Pair:
        """Return the keys and values that the layer attends to."""
        if self._given is None:
            raise KeyError(kind)
        return self._given

    def __setitem__(self, kind: str, made: _Pair) -> None:
        """Take the layer's own."""
        self.made = made
