"""Equalised channels: what the inputs of a matrix lose in range, its columns gain, and the model stays the same.

A static scale for a whole tensor is set by its largest channel. Channel j of the inputs is divided by

    s_j = max|X_j|^a / max|W_j|^(1 - a)

and column j of every matrix behind it multiplied by it (Xiao et al. 2023, SmoothQuant, eq. 4). The division is folded
into what makes the channel: the gain of the normalisation before it, the value rows before the output projection (one
factor for all heads that share them), and the up rows before the down projection.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.calibrate.ranges import ChannelRanges, output_place
from exporter.calibrate.statistics import HEAD_SITE, Statistics
from exporter.errors import RequestError
from exporter.model.families import FINAL_NORM, HEAD, LINEARS, NORMS, QKV_BIASES, layer_tensor
from exporter.model.model import Model
from exporter.weights.format import Float32

# Factors further from one would only move the trouble of a channel that hardly ever speaks into the weights.
MOST_FACTOR = np.float32(1e4)


@dataclass(frozen=True)
class Rewritten:
    """A model in other coordinates that computes the same, and what its activations look like there."""

    model: Model
    statistics: Statistics


def equalised(model: Model, statistics: Statistics, alpha: float) -> Rewritten:
    """Return the model with equalised channels.

    A tied head keeps its inputs as they are: its matrix is the embedding too.

    Args:
        model: The source; its matrices are read once for their largest weights.
        statistics: With the ranges of its activations.
        alpha: How much of the inputs' spread goes into the weights, from 0 to 1.

    Raises:
        RequestError: the ranges were not observed.
    """
    factors: dict[str, Float32] = {}
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    for layer in range(model.architecture.layers):
        for site, (makers, users) in _places(model, layer).items():
            found = _factors(model, statistics, site, users, alpha)
            if site.endswith("attention_out"):
                found = _shared_by_heads(model, found)
            factors[site] = found
            columns |= dict.fromkeys(users, found)
            made = _of_key_value_heads(model, found) if site.endswith("attention_out") else found
            rows |= dict.fromkeys(makers, made)
            if not site.endswith("_in"):
                role = "v" if site.endswith("attention_out") else "up"
                factors[output_place(layer, role)] = made
    if not model.architecture.tied:
        found = _factors(model, statistics, HEAD_SITE, [HEAD], alpha)
        factors[HEAD_SITE], columns[HEAD], rows[FINAL_NORM] = found, found, found
    tensors = _Scaled(model, rows, columns)
    return Rewritten(replace(model, tensors=tensors), _ScaledStatistics(statistics, factors))


def _places(model: Model, layer: int) -> dict[str, tuple[list[str], list[str]]]:
    """Return site -> the tensors whose rows make its channels, and the matrices whose columns take them."""
    users: dict[str, list[str]] = {}
    for path, site in LINEARS.values():
        users.setdefault(site, []).append(layer_tensor(layer, f"{path}.weight"))
    values = [f"{LINEARS['v'][0]}.weight"]
    values += [QKV_BIASES["v_bias"]] if "v_bias" in model.architecture.family.vectors else []
    makers = {
        "attention_in": [NORMS["attention_norm"]],
        "attention_out": values,
        "mlp_in": [NORMS["mlp_norm"]],
        "mlp_out": [f"{LINEARS['up'][0]}.weight"],
    }
    return {
        f"layers.{layer}.{site}": ([layer_tensor(layer, name) for name in made], users[site])
        for site, made in makers.items()
    }


def _factors(model: Model, statistics: Statistics, site: str, users: list[str], alpha: float) -> Float32:
    """Return s of eq. 4, float32 [columns]; one for a channel that is never used or never heard."""
    ranges = statistics.ranges(site)
    if ranges is None:
        raise RequestError("the ranges of the activations were not observed", where=site)
    heard = ranges.largest
    weights = np.max([np.abs(model.read(name)).max(axis=0) for name in users], axis=0)
    both = (heard > 0) & (weights > 0)
    ratio = np.where(both, heard, 1) ** alpha / np.where(both, weights, 1) ** (1 - alpha)
    # Only ratios matter within a tensor: the middle one stays as it is.
    ratio = ratio / np.median(ratio[both]) if both.any() else ratio
    return np.where(both, np.clip(ratio, 1 / MOST_FACTOR, MOST_FACTOR), 1).astype(np.float32)


def _shared_by_heads(model: Model, factors: Float32) -> Float32:
    """Return factors of the heads' outputs that are equal wherever heads share their values: the geometric mean."""
    shape = model.architecture
    heads = np.log(factors).reshape(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    shared = np.exp(heads.mean(axis=1, keepdims=True))
    return np.broadcast_to(shared, heads.shape).reshape(-1).astype(np.float32)


def _of_key_value_heads(model: Model, factors: Float32) -> Float32:
    """Return the factors of the values themselves, float32 [key-value heads x head width]."""
    shape = model.architecture
    heads = factors.reshape(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    return np.ascontiguousarray(heads[:, 0]).reshape(-1)


class _Scaled:
    """The tensors of a model, rows divided and columns multiplied when they are read."""

    def __init__(self, model: Model, rows: dict[str, Float32], columns: dict[str, Float32]) -> None:
        self._source = model.tensors
        self._rows = rows
        self._columns = columns
        self.files: list[Path] = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the source."""
        return self._source.shapes()

    def read(self, name: str) -> Float32:
        """Return a tensor of the source in the new coordinates."""
        values = self._source.read(name)
        if name in self._columns:
            values = values * self._columns[name]
        if name in self._rows:
            divisor = self._rows[name]
            values = values / (divisor[:, None] if values.ndim == 2 else divisor)
        return values


class _ScaledStatistics(Statistics):
    """Statistics of the inputs and outputs that the new coordinates have."""

    def __init__(self, source: Statistics, factors: dict[str, Float32]) -> None:
        self._source = source
        self._factors = factors
        self._scaled: tuple[str, Float32] | None = None
        self.tokens = source.tokens

    def second_moment(self, site: str) -> Float32 | None:
        """Return E[x x^T] there, float32 [columns, columns]; the last one is kept."""
        given = self._source.second_moment(site)
        if given is None or site not in self._factors:
            return given
        if self._scaled is None or self._scaled[0] != site:
            factor = self._factors[site]
            self._scaled = site, given / factor[:, None] / factor
        return self._scaled[1]

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] there, float32 [columns]."""
        given = self._source.importance(site)
        return given if given is None or site not in self._factors else given / self._factors[site] ** 2

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges of a place there."""
        given = self._source.ranges(place)
        return given if given is None or place not in self._factors else given.over(self._factors[place])
