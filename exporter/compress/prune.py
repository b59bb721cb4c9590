"""Closed-form pruning of feed-forward channels: the least costly are removed, and `down` is repaired for their loss.

With h the inputs of `down`, W its weights and H = E[w h h^T], the best weights for the remaining channels K are

    W' = W H_:K (H_KK)^-1,

the least-squares fit to the output of all channels. Its error D is a KL divergence of 1/2 sum_i s_i (D H D^T)_ii per
token, as in `exporter.calibrate.statistics`. Removing channels B from those that are left adds
1/2 tr(A_B^T (P_BB)^-1 A_B), where P is the inverse of H over the channels that are left and A = W'^T diag(s)^1/2.
Channels are therefore removed a few at a time, those with the least |A_c|^2 / P_cc first (Hassibi and Stork 1993,
Optimal Brain Surgeon, eq. 5, for whole columns; Kurtic et al. 2023, ZipLM, section 3.1). The cost of each step
determines how many channels each layer can spare.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics
from exporter.foundation import cache_entries as entries
from exporter.foundation.cache import cache_folder, locked
from exporter.foundation.cache_entries import ARRAY, VECTORS, filling, is_whole, load
from exporter.foundation.errors import RequestError
from exporter.model.blocks import GatedChannels
from exporter.model.decoder import Decoder
from exporter.model.model import Model
from exporter.model.widths import Channels, selected

VERSION = 1
CHANNELS_AT_ONCE = 8
DAMPING = 0.01
LOSSES = "losses.npy"
# A layer keeps at least this share of its channels, however little they seem to matter: the quadratic form of the loss
# holds only for small losses.
LEAST_KEPT = 0.25


@dataclass(frozen=True)
class ClosedFormOptions:
    """Options of closed-form pruning.

    Attributes:
        ratio: Share of the feed-forward channels to remove.
        multiple: Each layer keeps a multiple of this many channels: 32 fits every runtime's blocks, 256 the K types.
        even: All layers keep equally many; otherwise, layers that can spare more lose more.
        damping: Added to the diagonal of H, as a share of its mean.
    """

    ratio: float = 0.25
    multiple: int = 32
    even: bool = False
    damping: float = DAMPING


@dataclass(frozen=True)
class Pruned:
    """A model with fewer feed-forward channels.

    Its statistics must be collected anew, not selected from the original's: all inputs behind a pruned layer differ.

    Attributes:
        model: The model.
        ratio: Share of the channels that were removed.
        predicted_kl: Predicted KL divergence per token, in nats; None without a prediction.
    """

    model: Model
    ratio: float
    predicted_kl: float | None = None

    @classmethod
    def of(
        cls, model: Model, kept: Sequence[Channels], down: dict[int, Path], predicted_kl: float | None = None
    ) -> "Pruned":
        """Select channels of a model; see `exporter.model.widths.selected`."""
        ratio = 1 - sum(map(len, kept)) / sum(model.decoder.intermediate)
        return cls(selected(model, kept, down), ratio, predicted_kl)


def planned_widths(decoder: Decoder, ratio: float, multiple: int) -> tuple[int, ...]:
    """Return how many channels each layer keeps if all lose the same share; reads no weights.

    Args:
        decoder: Decoder of the model to prune.
        ratio: Share of the channels to remove.
        multiple: Widths are rounded to multiples of this.

    Raises:
        RequestError: the feed-forward part is not gated, or the ratio is impossible or lost in rounding.
    """
    if any(block.channels is None for block in decoder.blocks):
        raise RequestError(
            f"the feed-forward part of a {decoder.family.architecture} is not gated",
            expected="down(act(gate x) * up x)",
            next_step="leave out the step that prunes",
        )
    if not 0 < ratio < 1:
        raise RequestError("the share to prune is impossible", got=ratio, expected="a number between 0 and 1")
    if multiple < 1:
        raise RequestError("the widths cannot be rounded", got=f"a multiple of {multiple}", expected="1 or more")
    before = decoder.intermediate
    widths = tuple(min(round((1 - ratio) * width / multiple) * multiple, width) for width in before)
    if widths == before or min(widths) == 0:
        raise RequestError(
            f"the share to prune rounds to {'none' if widths == before else 'all'} of a layer's channels",
            got=f"{ratio} of {', '.join(map(str, sorted(set(before))))} channels in steps of {multiple}",
            next_step="choose another share or a smaller multiple",
        )
    return widths


def uneven_widths(even: Sequence[int], decoder: Decoder, multiple: int) -> tuple[int, ...]:
    """Return widths of the same sum, as uneven as possible: the first layer keeps all channels, others lose more.

    Args:
        even: Widths from `planned_widths`.
        decoder: Decoder of the model to prune.
        multiple: Widths are rounded to multiples of this.
    """
    widths = list(even)
    for layer in range(1, len(widths)):
        room = decoder.intermediate[0] - widths[0]
        spare = widths[layer] - _least(decoder.intermediate[layer], multiple)
        moved = max(0, min(room, spare)) // multiple * multiple
        widths[0] += moved
        widths[layer] -= moved
    return tuple(widths)


def prune(
    model: Model, statistics: Statistics, options: ClosedFormOptions, progress: Callable[[int, int], None] = silent
) -> Pruned:
    """Return the model without the channels that cost least, repaired; earlier results come from the cache.

    Args:
        model: The source.
        statistics: Statistics of the inputs and outputs of its `down`.
        options: Options of the pruning.
        progress: Called with layers done, each twice, and their total.

    Raises:
        RequestError: see `planned_widths`; or the inputs were not observed.
    """
    widths = planned_widths(model.decoder, options.ratio, options.multiple)
    layers = len(widths)
    path = _cached(model, statistics, *sorted(asdict(options).items())) / "kept.npz"

    def choose() -> dict[str, Channels]:
        chosen = _chosen(model, statistics, options, widths, lambda done, _: progress(done, 2 * layers))
        return {str(layer): channels for layer, channels in enumerate(chosen)}

    saved = entries.kept(path, VECTORS, choose)
    kept = [saved[str(layer)] for layer in range(layers)]
    return repair(model, statistics, kept, options.damping, lambda done, _: progress(layers + done, 2 * layers))


def repair(
    model: Model,
    statistics: Statistics,
    kept: Sequence[Channels],
    damping: float = DAMPING,
    progress: Callable[[int, int], None] = silent,
) -> Pruned:
    """Return the model with the given channels and with `down` repaired; cached as in `prune`.

    Args:
        model: The source.
        statistics: Statistics of the inputs and outputs of its `down`.
        kept: For each layer the remaining channels, ascending.
        damping: See `ClosedFormOptions`.
        progress: Called with layers done and their total.

    Raises:
        RequestError: the inputs were not observed.
    """
    digests = [hashlib.sha256(channels.astype("<i8").tobytes()).hexdigest() for channels in kept]
    folder = _cached(model, statistics, damping, *digests)
    files = {layer: folder / _down_file(layer) for layer in range(len(kept))}
    needed = (*files.values(), folder / LOSSES)
    if not all(map(is_whole, needed)):
        with locked(folder):
            if not all(map(is_whole, needed)):
                _repair(model, statistics, kept, damping, folder, progress)
    return Pruned.of(model, kept, files, float(load(folder / LOSSES, ARRAY).sum()) / 2)


def _repair(
    model: Model,
    statistics: Statistics,
    kept: Sequence[Channels],
    damping: float,
    folder: Path,
    progress: Callable[[int, int], None],
) -> None:
    """Write the repaired matrices and their losses into a folder."""
    losses = []
    with filling(folder) as files:
        for layer, channels in enumerate(kept):
            progress(layer, len(kept))
            weight, moment = _down(model, layer), _moment(model, statistics, layer, damping)
            found = repaired(weight, moment, channels)
            files.save(_down_file(layer), ARRAY, found.numpy())
            change = -weight
            change[:, torch.from_numpy(channels)] += found
            errors = (change @ moment * change).sum(1)
            losses.append(float(errors @ _sensitivity(statistics, layer)))
        files.save(LOSSES, ARRAY, np.array(losses))
    progress(len(kept), len(kept))


def _down_file(layer: int) -> str:
    return f"down.{layer}.npy"


def losses(model: Model, statistics: Statistics, layer: int, masks: Sequence[Channels]) -> NDArray[np.float64]:
    """Return the predicted KL divergence of each of several masks of a layer, float64 [masks].

    Without repair, D is the part of `down` on the removed channels B: 1/2 sum_ij (A A^T)_ij H_ij over B.

    Args:
        model: The source.
        statistics: Statistics of the inputs and outputs of its `down`.
        layer: Index of the layer.
        masks: Remaining channels of each mask.

    Raises:
        RequestError: the inputs were not observed.
    """
    outputs = (_down(model, layer) * _sensitivity(statistics, layer).sqrt()[:, None]).T
    products = (outputs @ outputs.T).mul_(_moment(model, statistics, layer, damping=0))
    gone = torch.ones(len(masks), len(products), dtype=torch.float64)
    for mask, kept in zip(gone, masks, strict=True):
        mask[torch.from_numpy(kept)] = 0
    found: NDArray[np.float64] = ((gone @ products) * gone).sum(1).div_(2).numpy()
    return found


def _cached(model: Model, statistics: Statistics, *decisive: object) -> Path:
    key = f"{VERSION}:{model.digest}:{statistics.key}:{decisive}"
    return cache_folder("pruned", hashlib.sha256(key.encode()).hexdigest()[:32])


def _chosen(
    model: Model,
    statistics: Statistics,
    options: ClosedFormOptions,
    widths: tuple[int, ...],
    progress: Callable[[int, int], None],
) -> list[Channels]:
    """Return the remaining channels of each layer."""
    found = []
    for layer, width in enumerate(widths):
        progress(layer, len(widths))
        least = width if options.even else min(width, _least(model.decoder.intermediate[layer], options.multiple))
        moment = _moment(model, statistics, layer, options.damping)
        found.append(eliminate(_down(model, layer), _sensitivity(statistics, layer), moment, least))
    if not options.even:
        widths = shared_out(found, sum(widths), options.multiple)
    return [one.kept(width) for one, width in zip(found, widths, strict=True)]


def _least(width: int, multiple: int) -> int:
    """Return the fewest channels that a layer may keep, rounded to a multiple."""
    return max(1, -(-int(LEAST_KEPT * width) // multiple)) * multiple


def _down(model: Model, layer: int) -> torch.Tensor:
    return torch.from_numpy(model.read(channels_of(model, layer).down.group.name)).double()


def _sensitivity(statistics: Statistics, layer: int) -> torch.Tensor:
    return torch.from_numpy(statistics.sensitivity(layer, "down")).double()


def channels_of(model: Model, layer: int) -> GatedChannels:
    """Return the channels of a layer's gated feed-forward part; `planned_widths` refuses a model without."""
    channels = model.decoder.blocks[layer].channels
    assert channels is not None
    return channels


def _moment(model: Model, statistics: Statistics, layer: int, damping: float) -> torch.Tensor:
    """Return damped H of the inputs of a layer's `down`, float64 [channels, channels]."""
    name = channels_of(model, layer).down.group.site
    site = statistics.site(name)
    if site is None:
        raise RequestError("the inputs of down were not observed", where=name, next_step="collect statistics first")
    moment = torch.from_numpy(site.second_moment).double()
    diagonal = moment.diagonal()
    mean = float(diagonal.mean())
    diagonal += damping * (mean if mean > 0 else 1.0)
    return moment


@dataclass(frozen=True)
class Elimination:
    """The order in which the channels of a layer are removed.

    Attributes:
        channels: Number of channels.
        order: The removed channels, in order of removal, int64 [gone].
        losses: What each removal adds to the weighted squared error of the outputs after repair, float64 [gone].
    """

    channels: int
    order: Channels
    losses: NDArray[np.float64]

    def kept(self, width: int) -> Channels:
        """Return the remaining channels at a width, ascending."""
        return np.setdiff1d(np.arange(self.channels), self.order[: self.channels - width])

    def loss(self, width: int) -> float:
        """Return the error at a width."""
        return float(self.losses[: self.channels - width].sum())


def eliminate(
    weight: torch.Tensor, sensitivity: torch.Tensor, moment: torch.Tensor, least: int, at_once: int = CHANNELS_AT_ONCE
) -> Elimination:
    """Repeatedly remove the channel that costs least.

    Args:
        weight: W, float64 [outputs, channels].
        sensitivity: s, float64 [outputs].
        moment: H, positive definite, float64 [channels, channels].
        least: Fewest channels that remain.
        at_once: Number removed before the costs of the others are computed again.
    """
    # P and A of the remaining channels; rows of the others are zero.
    inverse = torch.linalg.inv(moment)
    outputs = (weight * sensitivity.sqrt()[:, None]).T.contiguous()
    left = torch.ones(len(moment), dtype=torch.bool)
    order, losses = [np.empty(0, np.int64)], [np.empty(0)]
    for count in range(len(moment), least, -at_once):
        scores = torch.where(left, outputs.square().sum(1) / inverse.diagonal(), torch.inf)
        going = scores.topk(min(at_once, count - least), largest=False).indices
        rows, gone = inverse[going], outputs[going]
        solved = torch.linalg.solve(rows[:, going], torch.cat([gone, rows], dim=1))
        by_outputs, by_rows = solved.split([gone.shape[1], len(moment)], dim=1)
        order.append(going.numpy())
        losses.append(np.full(len(going), float((gone * by_outputs).sum()) / len(going)))
        outputs.addmm_(rows.T, by_outputs, alpha=-1)
        inverse.addmm_(rows.T, by_rows, alpha=-1)
        left[going] = False
    return Elimination(len(moment), np.concatenate(order), np.concatenate(losses))


def repaired(weight: torch.Tensor, moment: torch.Tensor, kept: Channels) -> torch.Tensor:
    """Return W' for the remaining channels, float32 [outputs, kept].

    Args:
        weight: W, float64 [outputs, channels].
        moment: H, positive definite, float64 [channels, channels].
        kept: The remaining channels.
    """
    rows = moment[torch.from_numpy(kept)]
    solution: torch.Tensor = torch.linalg.solve(rows[:, torch.from_numpy(kept)], rows @ weight.T)
    return solution.T.float().contiguous()


def shared_out(eliminations: Sequence[Elimination], total: int, multiple: int) -> tuple[int, ...]:
    """Return the number of channels that each layer keeps, as multiples, so that the total cost is least.

    The cheapest step is taken first, which is best if each layer's steps become more expensive.

    Args:
        eliminations: One for each layer.
        total: Channels that all layers keep together.
        multiple: Each width is a multiple of this.
    """
    sums = [np.concatenate([[0.0], one.losses.cumsum()]) for one in eliminations]
    widths = [one.channels // multiple * multiple for one in eliminations]

    def cost(layer: int) -> float:
        gone = eliminations[layer].channels - widths[layer]
        return float(sums[layer][gone + multiple] - sums[layer][gone]) if gone + multiple < len(sums[layer]) else np.inf

    while sum(widths) > total:
        widths[min(range(len(widths)), key=cost)] -= multiple
    return tuple(widths)
