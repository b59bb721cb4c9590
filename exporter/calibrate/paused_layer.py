"""A forward pass of a layer that stops at each site, so that the matrices there can be replaced before it goes on.

Every batch of windows is a call of transformers' own module in a greenlet: when the first matrix of a site is about to
run, a hook suspends the call and hands its input over. A family thus describes no computation a second time.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from exporter.calibrate.layer_stream import LayerInputs, LoadedLayer, as_windows
from exporter.formats.format import Float32
from exporter.model.blocks import Linear


class PausedLayer:
    """One model in one layer.

    It does not stop at the sites of experts, which only some batches reach.

    Attributes:
        parts: The slices of windows that are batches.
        hidden: Hidden states, float32 [windows, length, channels]: before the layer, and after it at its end.
        inputs: Inputs of the current site, by the first window of each batch, float32 [windows, length, columns].
        stream: The residual stream at the entrance of the current sublayer, likewise.
    """

    def __init__(self, layer: LoadedLayer, hidden: torch.Tensor, own: LayerInputs) -> None:
        self._layer, self._before, self._own = layer, hidden, own
        self.hidden = layer.room(hidden)
        self.inputs: dict[int, torch.Tensor] = {}
        self.stream: dict[int, torch.Tensor] = {}
        self._current = slice(0)
        self.parts = list(layer.parts(hidden))
        self._calls = [(part, greenlet(partial(self._forward, part))) for part in self.parts]
        self._hooks = [self._hooked(sublayer.entrance, self._see_stream) for sublayer in layer.block.sublayers]
        self._hooks += [
            self._hooked(site.linears[0].module, self._pause) for site in layer.block.sites if not site.routed
        ]

    def _hooked(self, path: str, see: Callable[[torch.Tensor], None]) -> Any:
        module = self._layer.module.get_submodule(path)
        return module.register_forward_pre_hook(lambda _, given: see(given[0]))

    def _forward(self, part: slice) -> None:
        self.hidden[part] = self._layer.output(self._before[part], self._own.of(self._layer.block.layer, part))

    def _see_stream(self, given: torch.Tensor) -> None:
        self.stream[self._current.start] = given

    def _pause(self, given: torch.Tensor) -> None:
        self.inputs[self._current.start] = as_windows(given)
        waiting = getcurrent().parent
        assert waiting is not None
        waiting.switch()

    def advance(self) -> None:
        """Run to the next site, or to the end of the layer."""
        for part, call in self._calls:
            self._current = part
            call.parent = getcurrent()
            call.switch()

    def weight(self, linear: Linear) -> Float32:
        """Return the weights of a matrix, float32 [rows, columns]; they must not be changed."""
        weight: Float32 = self._layer.module.get_submodule(linear.module).get_parameter("weight").detach().numpy()
        return weight

    def replace(self, linear: Linear, weight: Float32) -> None:
        """Go on with other weights of a matrix at the current site, float32 [rows, columns]."""
        module = self._layer.module.get_submodule(linear.module)
        module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)

    def __enter__(self) -> Self:
        """Return the layer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End calls that are suspended, and remove the hooks."""
        for _, call in self._calls:
            # True while it is suspended.
            if call:
                call.throw()
        for hook in self._hooks:
            hook.remove()
