"""PruneNet: a policy that learns which feed-forward channels to keep, from the singular values of `gate` alone.

The state of a layer is its gate matrix W, [rows, columns]. One network for all layers gives every row a probability,

    alpha = sigmoid((W P^T + b) r),    o = sigmoid(logit(eps) + logit(alpha)),    eps ~ U(0, 1),

and K rows are drawn by o without replacement. The reward is 1 / KS, where KS is the Kolmogorov-Smirnov distance between
the singular values of the drawn rows and those of all rows, discounted by the number of the layer; REINFORCE follows
its gradient (Sengupta et al. 2025, PruneNet). No text is used. A policy learned at one share of rows applies to others.

With no other function between P and r, the network is a direction u = P^T r: rows stay by their inner product with it.

Where the published code differs from the paper, `PruneNetOptions` has a switch, and `PUBLISHED` holds the code's
choices. The defaults correct the steps before and after learning: the gains of the preceding normalisation are folded
into W, the best policy is kept, and the mask is not drawn again. Learning itself stays as published, which learns
nothing: no reward is below zero, so every row's probability grows until all are 1. A gradient that does follow the
reward (a baseline, the probability of the drawn rows, at the noise of the draw) makes masks worse. The reward is for
rows that preserve the singular values, and a policy good at that takes the rows on one side of a plane, which costs
more than random rows (tests/benchmarks/test_prune.py). With statistics of a text, each layer therefore keeps the best
of several masks that the policy draws, which is better than chance. The published code trains in float16 on a GPU;
here everything is float32.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import Statistics
from exporter.compress.prune import Pruned, channels_of, losses, planned_widths
from exporter.formats.format import Float32
from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import VECTORS, kept
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.widths import Channels

Float64 = NDArray[np.float64]

VERSION = 2
# Reward of a policy if all singular values stay the same.
MOST_REWARD = 99999.0
# Momentum of the running mean of a layer's rewards, which is their baseline.
MOMENTUM = 0.7
# Masks per layer from which the calibration text selects.
DRAWS = 64
# Smallest weight of a row, relative to the largest, which is 1.
LEAST_WEIGHT = 1e-300


@dataclass(frozen=True)
class PruneNetOptions:
    """How a policy is learned and used.

    Attributes:
        ratio: Share of rows that are removed while it learns.
        episodes: Passes over all layers.
        learning_rate: Learning rate of AdamW.
        discount: gamma: the reward of layer l counts gamma^l.
        seed: Seed of the network's initialisation and of all draws.
        keep_best: Keep the policy with the largest reward; published: the last.
        baseline: Subtract the layer's mean so far from rewards; published and default: no baseline.
        exact_probability: Use the gradient of drawing without replacement; published and default: of the sum of log o.
        same_noise: Take the gradient at the o of the draw; published and default: at o with fresh noise.
        deterministic: Keep rows at equal distances of the running sum of their probabilities (see `spread`);
            published: draw them again.
        clip: Largest norm of a gradient; None for no limit, as published (its clipping comes after the gradient is
            zeroed).
        regularisation: Weight of KL(alpha || 1/2) in the loss.
        folded: Fold the normalisation's gains into the columns of W, so that two ways to store one function are pruned
            alike; published: W is used as stored.
    """

    ratio: float = 0.25
    episodes: int = 20
    learning_rate: float = 1e-3
    discount: float = 0.99
    seed: int = 42
    keep_best: bool = True
    baseline: bool = False
    exact_probability: bool = False
    same_noise: bool = False
    deterministic: bool = True
    clip: float | None = None
    regularisation: float = 0.0
    folded: bool = True


PUBLISHED = PruneNetOptions(keep_best=False, deterministic=False, folded=False)


@dataclass(frozen=True)
class Policy:
    """A learned policy.

    Attributes:
        direction: u, float32 [hidden].
        offset: b r; the probabilities depend on it, the order of rows does not.
        rewards: Sum of all layers' rewards in each episode, float32 [episodes].
        options: Options of the learning.
    """

    direction: Float32
    offset: float
    rewards: Float32
    options: PruneNetOptions

    def kept(
        self, model: Model, widths: Sequence[int], statistics: Statistics | None = None, draws: int = DRAWS
    ) -> list[Channels]:
        """Return the remaining channels of each layer, ascending.

        Args:
            model: The model that it was learned on, or one of the same width.
            widths: Number of remaining channels per layer.
            statistics: Statistics of the inputs and outputs of its `down`: each layer takes, of several masks, the one
                with the least predicted loss. None: the policy's own mask, without any text.
            draws: Number of masks drawn in addition to the policy's own.

        Raises:
            RequestError: the inputs were not observed.
        """
        chance = torch.Generator().manual_seed(self.options.seed)
        found = []
        for layer, width in enumerate(widths):
            logits = torch.from_numpy(_gate(model, layer, self.options) @ self.direction + np.float32(self.offset))
            best = self._mask(logits, width, chance)
            if statistics is not None and draws:
                masks = [best, *(_drawn_mask(logits, width, chance) for _ in range(draws))]
                best = masks[int(np.argmin(losses(model, statistics, layer, masks)))]
            found.append(best)
        return found

    def _mask(self, logits: torch.Tensor, width: int, chance: torch.Generator) -> Channels:
        if self.options.deterministic:
            return spread(nn.functional.logsigmoid(logits.double()).numpy(), width)
        return _drawn_mask(logits, width, chance)


def learned(model: Model, options: PruneNetOptions, progress: Callable[[int, int], None] = silent) -> Policy:
    """Return a policy for a model, from the cache if it was learned before.

    Args:
        model: Its gate matrices are held in memory.
        options: Options of the learning.
        progress: Called with episodes done and their total.

    Raises:
        RequestError: there is no episode to learn in; or see `exporter.compress.prune.planned_widths`.
    """
    if options.episodes < 1:
        raise RequestError("PruneNet cannot learn", got=f"{options.episodes} episodes", expected="1 or more")
    planned_widths(model.decoder, options.ratio, 1)
    decisive = f"{VERSION}:{model.digest}:{sorted(asdict(options).items())}"
    path = cache_folder("policies") / f"{hashlib.sha256(decisive.encode()).hexdigest()[:32]}.npz"

    def learn() -> dict[str, np.ndarray]:
        policy = _learn(model, options, progress)
        return {"direction": policy.direction, "offset": np.array(policy.offset), "rewards": policy.rewards}

    saved = kept(path, VECTORS, learn)
    return Policy(saved["direction"], float(saved["offset"]), saved["rewards"], options)


def prune(
    model: Model, policy: Policy, ratio: float, multiple: int, statistics: Statistics | None = None, draws: int = DRAWS
) -> Pruned:
    """Return the model with the channels that a policy keeps, at any ratio; nothing is repaired.

    Args:
        model: The source.
        policy: The policy learned on it.
        ratio: Share of the channels to remove.
        multiple: See `exporter.compress.prune.ClosedFormOptions`.
        statistics: See `Policy.kept`.
        draws: See `Policy.kept`.

    Raises:
        RequestError: see `exporter.compress.prune.planned_widths` and `Policy.kept`.
    """
    widths = planned_widths(model.decoder, ratio, multiple)
    return Pruned.of(model, policy.kept(model, widths, statistics, draws), {})


def spread(logarithms: Float64, count: int) -> Channels:
    """Return rows in proportion to their probabilities but without drawing, ascending: systematic sampling.

    The rows with the greatest probabilities all lie on one side of a plane, so nothing would span the other side. The
    rows kept are therefore those where the running sum of the probabilities passes 1/2, 3/2, ... (Madow and Madow 1944,
    section 4).

    Args:
        logarithms: Logarithms of the rows' relative probabilities to stay, float64 [rows].
        count: Number of rows that stay.
    """
    # Every row keeps some probability, so that it can stay if too few others are left.
    weights = np.maximum(np.exp(logarithms - logarithms.max()), LEAST_WEIGHT)
    certain = np.zeros(len(weights), bool)
    while True:
        left = count - int(certain.sum())
        probabilities = np.where(certain, 0, weights)
        probabilities *= left / max(probabilities.sum(), LEAST_WEIGHT)
        over = probabilities >= 1
        if not over.any():
            break
        certain |= over
    places = np.searchsorted(probabilities.cumsum(), np.arange(left) + 0.5)
    return np.sort(np.concatenate([np.flatnonzero(certain), places]))


def _gate(model: Model, layer: int, options: PruneNetOptions) -> Float32:
    """Return a layer's gate matrix as a policy sees it, float32 [rows, hidden]."""
    stored = model.read(channels_of(model, layer).gate.group.name)
    norm = next(one.norm_before for one in model.decoder.blocks[layer].sublayers if one.channels is not None)
    return stored * (model.read(norm.name) + np.float32(norm.offset)) if options.folded and norm else stored


class _Network(nn.Module):
    """The policy network for layers of a hidden width and at most so many rows."""

    def __init__(self, hidden: int, rows: int) -> None:
        super().__init__()
        self.project = nn.Linear(hidden, rows)
        self.read = nn.Parameter(torch.rand(rows))

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        """Return logit(alpha) of every row, float32 [rows]: the product of the paper, evaluated from the right."""
        return gate @ (self.read @ self.project.weight) + self.project.bias @ self.read


@dataclass(frozen=True)
class _Draw:
    """Rows in the order in which they were drawn, the noise of the draw, and the reward."""

    rows: torch.Tensor
    noise: torch.Tensor
    reward: float


def _learn(model: Model, options: PruneNetOptions, progress: Callable[[int, int], None]) -> Policy:
    gates = [torch.from_numpy(_gate(model, layer, options)) for layer in range(model.decoder.layers)]
    return follow_rewards(gates, options, progress)


def follow_rewards(
    gates: Sequence[torch.Tensor], options: PruneNetOptions, progress: Callable[[int, int], None]
) -> Policy:
    """Learn a policy for some gate matrices, each float32 [rows, hidden]."""
    chance = torch.Generator().manual_seed(options.seed)
    spectra = [singular_values(gate) for gate in gates]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = _Network(gates[0].shape[1], max(len(gate) for gate in gates))
    optimiser = torch.optim.AdamW(network.parameters(), options.learning_rate)
    baselines: list[float | None] = [None] * len(gates)
    best, earned = _state(network), []
    for episode in range(options.episodes):
        progress(episode, options.episodes)
        draws = [_draw(network, gate, seen, options, chance) for gate, seen in zip(gates, spectra, strict=True)]
        draws = [replace(draw, reward=draw.reward * options.discount**layer) for layer, draw in enumerate(draws)]
        earned.append(sum(draw.reward for draw in draws))
        if earned[-1] == max(earned):
            best = _state(network)
        for layer, (gate, draw) in enumerate(zip(gates, draws, strict=True)):
            before = baselines[layer] if options.baseline else 0.0
            baselines[layer] = draw.reward if before is None else MOMENTUM * before + (1 - MOMENTUM) * draw.reward
            if before is not None:
                _follow(network, optimiser, gate, draw, draw.reward - before, options, chance)
    progress(options.episodes, options.episodes)
    direction, offset = best if options.keep_best else _state(network)
    return Policy(direction, offset, np.array(earned, np.float32), options)


@torch.no_grad()
def _state(network: _Network) -> tuple[Float32, float]:
    direction = (network.read @ network.project.weight).numpy()
    return direction, float(network.project.bias @ network.read)


@torch.no_grad()
def _draw(
    network: _Network, gate: torch.Tensor, spectrum: Float64, options: PruneNetOptions, chance: torch.Generator
) -> _Draw:
    """Draw rows of a layer and reward them."""
    noise = _noise(len(gate), chance)
    rows = _drawn(network(gate) + noise, max(1, int((1 - options.ratio) * len(gate))), chance)
    distance = kolmogorov_smirnov(spectrum, singular_values(gate[rows]))
    return _Draw(rows, noise, 1 / distance if distance > 0 else MOST_REWARD)


def _follow(
    network: _Network,
    optimiser: torch.optim.Optimizer,
    gate: torch.Tensor,
    draw: _Draw,
    advantage: float,
    options: PruneNetOptions,
    chance: torch.Generator,
) -> None:
    """Take a step that raises the probability of the drawn rows in proportion to their advantage."""
    logits = network(gate)
    noise = draw.noise if options.same_noise else _noise(len(gate), chance)
    loss = -advantage * _log_probability(logits + noise, draw.rows, options.exact_probability)
    if options.regularisation:
        alpha = logits.sigmoid()
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, alpha, reduction="sum")
        loss = loss + options.regularisation * (len(alpha) * float(np.log(2)) - entropy)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if options.clip is not None:
        nn.utils.clip_grad_norm_(network.parameters(), options.clip)
    optimiser.step()


def _noise(rows: int, chance: torch.Generator) -> torch.Tensor:
    """Return logit(eps), float32 [rows]."""
    return torch.rand(rows, generator=chance).logit(eps=1e-6)


def _drawn_mask(logits: torch.Tensor, count: int, chance: torch.Generator) -> Channels:
    """Draw rows with fresh noise, ascending."""
    return np.sort(_drawn(logits + _noise(len(logits), chance), count, chance).numpy())


def _drawn(logits: torch.Tensor, count: int, chance: torch.Generator) -> torch.Tensor:
    """Draw rows by o = sigmoid(logits) without replacement, int64 [count], in the order of drawing."""
    return logits.sigmoid().clamp(min=1e-30).multinomial(count, generator=chance)


def _log_probability(logits: torch.Tensor, rows: torch.Tensor, exact: bool) -> torch.Tensor:
    """Return the logarithm of the probability to draw rows in this order, or the sum of log o over them."""
    logs = nn.functional.logsigmoid(logits)
    total = logs[rows].sum()
    if not exact:
        return total
    o = logs.exp()
    drawn = o[rows]
    # Each is drawn from those that were left.
    left = o.sum() - drawn.cumsum(0) + drawn
    return total - left.clamp(min=1e-30).log().sum()


def singular_values(matrix: torch.Tensor) -> Float64:
    """Return the singular values of a matrix, float32 [rows, columns], ascending.

    Computed from the smaller Gram matrix, which is several times faster; in float64 the error is about 1e-8 of the
    greatest value.
    """
    wide = matrix.double()
    gram = wide.T @ wide if len(wide) > wide.shape[1] else wide @ wide.T
    values: Float64 = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().numpy()
    return values


def kolmogorov_smirnov(first: Float64, second: Float64) -> float:
    """Return the greatest distance between the distribution functions of two samples, both ascending."""
    both = np.concatenate([first, second])
    shares = [np.searchsorted(sample, both, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())
