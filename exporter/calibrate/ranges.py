"""Ranges of activations: the minimum and maximum of every input and output channel of a matrix.

They are stored per channel, so the range of a whole tensor follows exactly for any scaling of its channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.calibrate.layer_stream import LoadedLayer, Outputs, check_finite, first_output
from exporter.formats.format import Float32
from exporter.foundation.cache_entries import ARRAY, Filling, load

HEAD_OUTPUT = "head_out"
# The head has many outputs, so their ranges are taken at this number of evenly spaced positions.
HEAD_POSITIONS = 512
HEAD_POSITIONS_AT_ONCE = 128


@dataclass(frozen=True)
class ChannelRanges:
    """Minimum and maximum of the channels at a place, each float32 [channels]."""

    low: Float32
    high: Float32

    @property
    def largest(self) -> Float32:
        """The largest magnitudes, float32 [channels]."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def over(self, divisor: Float32) -> "ChannelRanges":
        """Return the ranges of the channels divided by positive numbers, float32 [channels]."""
        return ChannelRanges(self.low / divisor, self.high / divisor)


def output_place(layer: int | None, part: str) -> str:
    """Return the name of the place of a matrix's outputs, such as `layers.3.q_out`."""
    return HEAD_OUTPUT if layer is None else f"layers.{layer}.{part}_out"


def load_ranges(folder: Path, place: str) -> ChannelRanges | None:
    """Return the saved ranges of a place, a site or an `output_place`; None if there are none."""
    path = folder / f"{place}.range.npy"
    return ChannelRanges(*load(path, ARRAY)) if path.is_file() else None


class _Extremes:
    """Running minimum and maximum of the channels of one place."""

    def __init__(self) -> None:
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None

    @classmethod
    def of_zeros(cls, channels: int) -> "_Extremes":
        """Return the ranges of channels that are always zero."""
        made = cls()
        made.add(torch.zeros(1, channels))
        return made

    def add(self, values: torch.Tensor) -> None:
        """Add values, float32 [..., channels]."""
        rows = values.reshape(-1, values.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)

    def save(self, folder: Filling, place: str) -> None:
        """Write the ranges under the place's name."""
        assert self._low is not None and self._high is not None
        folder.save(f"{place}.range.npy", ARRAY, torch.stack([self._low, self._high]).numpy())


@contextmanager
def observed_ranges(layer: LoadedLayer, folder: Filling) -> Iterator[None]:
    """Record the ranges of inputs and outputs of a layer's matrices while it runs, then save them."""
    places: dict[str, _Extremes] = {}

    def see(place: str, values: torch.Tensor) -> None:
        places.setdefault(place, _Extremes()).add(values)

    def inputs(place: str, _: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        see(place, given[0])

    def outputs(place: str, linear: nn.Module, _: object, made: Outputs) -> None:
        # Exclude the bias, which the runtime adds after the matrix product.
        bias, product = getattr(linear, "bias", None), first_output(made)
        see(place, product - bias if isinstance(bias, torch.Tensor) else product)

    hooks = [
        layer.module.get_submodule(site.linears[0].module).register_forward_pre_hook(partial(inputs, site.name))
        for site in layer.block.sites
    ]
    for part, linear in layer.block.linears.items():
        made = partial(outputs, output_place(layer.block.layer, part))
        hooks.append(layer.module.get_submodule(linear.module).register_forward_hook(made))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    # No token may have reached an expert.
    widths = {site.name: site.columns for site in layer.block.sites}
    widths |= {output_place(layer.block.layer, part): one.group.rows for part, one in layer.block.linears.items()}
    for place, width in widths.items():
        places.get(place, _Extremes.of_zeros(width)).save(folder, place)


def save_head_ranges(hidden: torch.Tensor, head: torch.Tensor, folder: Filling, site: str) -> None:
    """Save the ranges of the head's inputs, and of its outputs at some positions.

    Args:
        hidden: The head's input, float32 [windows, length, hidden].
        head: The matrix, float32 [vocab, hidden].
        folder: Folder to save to.
        site: Name of the head's input.

    Raises:
        InputError: an output is not finite.
    """
    inputs, outputs = _Extremes(), _Extremes()
    inputs.add(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    some = rows[:: max(1, len(rows) // HEAD_POSITIONS)]
    for first in range(0, len(some), HEAD_POSITIONS_AT_ONCE):
        made = some[first : first + HEAD_POSITIONS_AT_ONCE] @ head.T
        check_finite(made, "head")
        outputs.add(made)
    inputs.save(folder, site)
    outputs.save(folder, HEAD_OUTPUT)
