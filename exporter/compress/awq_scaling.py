"""Equalised channels: a matrix's inputs lose range, its columns gain it, and the model's function stays the same.

A static scale for a whole tensor is set by its largest channel. Channel j of the inputs is divided by

    s_j = max|X_j|^a / max|W_j|^(1 - a)

and column j of every matrix behind it is multiplied by it (Xiao et al. 2023, SmoothQuant, eq. 4). The division is
folded into the tensor that produces the channel: the gain of the normalisation before it, the value rows before the
output projection (one factor for all heads that share them), the up rows before the down projection, and the kernel of
a convolution before its output projection.

If activations are scaled dynamically in blocks of a few columns, the importance of a channel counts instead, as in AWQ
(Lin et al. 2024, eq. 4): s_j = E[x_j^2]^(a/2). Weights of large channels then lie on a finer part of their block's
grid, and large channels take less of the 8 bits to which activations in their block are rounded.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.ranges import ChannelRanges, output_place
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.compress.method import method_kind
from exporter.formats.format import Bytes, Float32
from exporter.formats.group import Decision
from exporter.formats.integers import Integers
from exporter.foundation.errors import RequestError
from exporter.foundation.fitted import fitted_value
from exporter.model.blocks import Producer
from exporter.model.decoder import HEAD_SITE
from exporter.model.model import Model
from exporter.model.tensors import HoldsCodes, HoldsFactors

# Clip the factors: scaling a rarely active channel further would only make its weights harder to quantise.
MOST_FACTOR = np.float32(1e4)
AWQ_ALPHA = fitted_value("exporter.compress", "awq_alpha")
Seen = TypeVar("Seen")
EVERY_SITE = ("attention_in", "attention_out", "conv_in", "conv_out", "mlp_in", "mlp_out", HEAD_SITE)


@dataclass(frozen=True)
class Rewritten:
    """An equivalent model in other coordinates, with the statistics of its activations there.

    Attributes:
        model: The model.
        statistics: Statistics of its activations, in those coordinates.
        factors: Place -> divisors of its channels, float32 [columns].
    """

    model: Model
    statistics: Statistics
    factors: Mapping[str, Float32] = field(default_factory=dict)

    def of(self, statistics: Statistics) -> Statistics:
        """Return other statistics of the source in these coordinates."""
        return _ScaledStatistics(statistics, self.factors) if self.factors else statistics


def equalised(model: Model, statistics: Statistics, alpha: float, sites: Collection[str]) -> Rewritten:
    """Return the model with equalised channels.

    The inputs of a tied head stay as they are, since its matrix is also the embedding.

    Args:
        model: The source; its matrices are read once for their largest weights.
        statistics: Statistics with the ranges of its activations.
        alpha: Share of the inputs' spread that goes into the weights, from 0 to 1.
        sites: Kinds of sites to equalise, of `EVERY_SITE`.

    Raises:
        RequestError: the ranges were not observed.
    """
    return rescaled(
        model, statistics, sites, lambda site, consumers: _factors(model, statistics, site, consumers, alpha)
    )


def scaled_channels(
    model: Model, statistics: Statistics, alpha: float = AWQ_ALPHA, kept: Collection[str] = ()
) -> Rewritten:
    """Return the model with channels of magnitude E[x^2]^((1 - alpha) / 2), everywhere but at a tied head.

    Args:
        model: The source.
        statistics: Statistics of the source.
        alpha: Share of the inputs' magnitude that goes into the weights, from 0 to 1.
        kept: Names of matrices that stay as they are, and so do the channels there.

    Raises:
        RequestError: the activations were not observed.
    """

    def factors(site: str, _: Collection[str]) -> Float32:
        power = observed(statistics.power(site), site).astype(np.float64)
        active = power > 0
        return _around(np.where(active, power, 1) ** (alpha / 2), active, _geometric_mean)

    return rescaled(model, statistics, EVERY_SITE, factors, kept)


def scaled_if_fitted(model: Model, statistics: Statistics, decisions: Collection[Decision]) -> Rewritten:
    """Return the model with scaled channels if that lowers the loss of a decision; it does not at 16 bits or more."""
    if any(
        method_kind(one.method).supports_error_propagation and one.format.stored_bytes(1, 256) < 2 * 256
        for one in decisions
    ):
        kept = [one.group.name for one in decisions if method_kind(one.method).keeps_codes]
        return scaled_channels(model, statistics, kept=kept)
    return Rewritten(model, statistics)


def observed(seen: Seen | None, site: str) -> Seen:
    """Return a site's observations.

    Raises:
        RequestError: nothing was observed.
    """
    if seen is None:
        raise RequestError("the activations were not observed", where=site)
    return seen


def rescaled(
    model: Model,
    statistics: Statistics,
    sites: Collection[str],
    factors_of: Callable[[str, Collection[str]], Float32],
    kept: Collection[str] = (),
) -> Rewritten:
    """Return the model with its columns at some sites multiplied by factors, and the channels there divided by them.

    Heads that share their values share their factors, the geometric mean. The inputs of a tied head stay as they are.

    Args:
        model: The source.
        statistics: Statistics of the source.
        sites: Sites to rescale; as for `equalised`.
        factors_of: Returns the factors, float32 [columns], of a site, given the matrices behind it.
        kept: Names of matrices that stay as they are.
    """
    factors: dict[str, Float32] = {}
    rows: dict[str, Float32] = {}
    columns: dict[str, Float32] = {}
    offsets: dict[str, float] = {}
    for place in _places(model, sites):
        if not {*place.consumers, *place.producer.tensors}.isdisjoint(kept):
            continue
        found = factors_of(place.site, place.consumers)
        made = found
        if place.producer.by_heads:
            found, made = _by_heads(model, found)
        factors[place.site] = found
        if place.output is not None:
            factors[place.output] = made
        columns |= dict.fromkeys(place.consumers, found)
        rows |= dict.fromkeys(place.producer.tensors, made)
        offsets |= {vector.name: vector.offset for vector in place.producer.vectors}
    tensors = _Scaled(model, rows, columns, offsets)
    return Rewritten(replace(model, tensors=tensors), _ScaledStatistics(statistics, factors), factors)


@dataclass(frozen=True)
class _Place:
    """A site and the tensors that are rewritten for it.

    Attributes:
        site: Its name.
        producer: The tensors that produce its channels.
        consumers: The matrices whose columns take them.
        output: Place where the outputs of the producer's matrix are observed; None if it has none.
    """

    site: str
    producer: Producer
    consumers: tuple[str, ...]
    output: str | None = None


def _places(model: Model, sites: Collection[str]) -> Iterator[_Place]:
    decoder = model.decoder
    for block in decoder.blocks:
        for site in block.sites:
            if site.producer is not None and site.kind in sites:
                consumers = tuple(linear.group.name for linear in site.linears)
                linear = site.producer.linear
                output = None if linear is None else output_place(block.layer, linear.part)
                yield _Place(site.name, site.producer, consumers, output)
    if HEAD_SITE in sites and not decoder.tied:
        yield _Place(HEAD_SITE, Producer((decoder.final_norm,)), (decoder.head.name,))


def _factors(model: Model, statistics: Statistics, site: str, consumers: Collection[str], alpha: float) -> Float32:
    """Return s of eq. 4, float32 [columns]; 1 for a channel that is never used or always zero."""
    ranges = statistics.ranges(site)
    if ranges is None:
        raise RequestError("the ranges of the activations were not observed", where=site)
    active = ranges.largest
    weights = np.max([np.abs(model.read(name)).max(axis=0) for name in consumers], axis=0)
    both = (active > 0) & (weights > 0)
    ratio = np.where(both, active, 1) ** alpha / np.where(both, weights, 1) ** (1 - alpha)
    return _around(ratio, both, np.median)


def _around(
    factors: NDArray[np.floating[Any]], usable: NDArray[np.bool_], middle: Callable[[NDArray[Any]], Any]
) -> Float32:
    """Return factors over their middle, since only ratios matter, float32 [columns]; 1 where they are not usable."""
    if usable.any():
        factors = factors / middle(factors[usable])
    return np.where(usable, np.clip(factors, 1 / MOST_FACTOR, MOST_FACTOR), 1).astype(np.float32)


def _geometric_mean(values: NDArray[Any]) -> float:
    return float(np.exp(np.log(values).mean()))


def _by_heads(model: Model, factors: Float32) -> tuple[Float32, Float32]:
    """Replace factors of the heads' outputs by their geometric mean over the heads that share values.

    Returns the factors of the outputs, float32 [heads x head width], and of the values, [key-value heads x head width].
    """
    shape = model.decoder
    heads = np.log(factors).reshape(shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    shared = np.exp(heads.mean(axis=1, keepdims=True)).astype(np.float32)
    return np.broadcast_to(shared, heads.shape).reshape(-1), shared.reshape(-1)


class _Scaled:
    """The tensors of a model, with rows divided and columns multiplied on reading.

    Args:
        model: The model.
        rows: Name -> divisors of its rows.
        columns: Name -> factors of its columns.
        offsets: Name of a vector -> what is added to its elements where they are used.
    """

    def __init__(
        self, model: Model, rows: dict[str, Float32], columns: dict[str, Float32], offsets: dict[str, float]
    ) -> None:
        self._source = model.tensors
        self._rows, self._columns, self._offsets = rows, columns, offsets
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the source."""
        return self._source.shapes()

    def read(self, name: str) -> Float32:
        """Return a tensor of the source in the new coordinates."""
        return self._scaled(name, self._source.read(name), slice(None))

    def stored_type(self, name: str) -> str | None:
        """Return the name of the format of a matrix that is not rewritten; None for any other."""
        unchanged = name not in self._rows and name not in self._columns
        return self._source.stored_type(name) if unchanged and isinstance(self._source, HoldsCodes) else None

    def integers(self, name: str) -> Integers | None:
        """Return the integers that a matrix consists of that is not rewritten; None for any other."""
        if self.stored_type(name) is None or not isinstance(self._source, HoldsCodes):
            return None
        return self._source.integers(name)

    def codes(self, name: str) -> Bytes:
        """Return the encoded rows of a matrix that is not rewritten."""
        assert isinstance(self._source, HoldsCodes)
        return self._source.codes(name)

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of the factors of each matrix that an adapter is kept beside, by its name."""
        return self._source.ranks() if isinstance(self._source, HoldsFactors) else {}

    def factors(self, name: str) -> tuple[Float32, Float32]:
        """Return L and R of a matrix in the new coordinates: L has its rows, R its columns."""
        assert isinstance(self._source, HoldsFactors)
        left, right = self._source.factors(name)
        if name in self._columns:
            right = right * self._columns[name]
        if name in self._rows:
            left = left / self._rows[name][:, None]
        return left, right

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix of the source in the new coordinates."""
        return self._scaled(name, self._source.read_rows(name, rows), rows)

    def _scaled(self, name: str, values: Float32, rows: NDArray[np.int64] | slice) -> Float32:
        if name in self._columns:
            values = values * self._columns[name]
        if name in self._rows:
            divisor, offset = self._rows[name][rows], np.float32(self._offsets.get(name, 0.0))
            gains = values + offset if offset else values
            gains = gains / divisor.reshape(-1, *(1,) * (values.ndim - 1))
            values = gains - offset if offset else gains
        return values


def _scaled_site(given: Site, factor: Float32) -> Site:
    """Return the statistics of a site whose channels are divided by factors, float32 [columns].

    A block's peak is assumed to follow its largest channel.
    """
    fitted, held = (moment / factor[:, None] / factor for moment in (given.fitted, given.held))
    power = (1 - given.share) * given.fitted.diagonal() + given.share * given.held.diagonal()
    peaks = {}
    for block, peak in given.peaks.items():
        before, after = (one.reshape(-1, block).max(axis=1) for one in (power, power / factor**2))
        peaks[block] = peak * np.where(before > 0, after / np.where(before > 0, before, 1), 1)
    return Site(fitted, held, given.share, given.squares / factor**2, peaks)


class _ScaledStatistics(Statistics):
    """Statistics of inputs and outputs in the new coordinates."""

    def __init__(self, source: Statistics, factors: Mapping[str, Float32]) -> None:
        self._source = source
        self._factors = factors
        self._last = None

    @property
    def key(self) -> str:
        """A digest of the source's key and the factors."""
        total = hashlib.sha256(self._source.key.encode())
        for name, factor in self._factors.items():
            total.update(f"{name}:".encode() + factor.tobytes())
        return total.hexdigest()

    def read_site(self, name: str) -> Site | None:
        """Return the statistics of a site in the new coordinates without keeping them."""
        given, factor = self._source.read_site(name), self._factors.get(name)
        return given if given is None or factor is None else _scaled_site(given, factor)

    def power(self, site: str) -> Float32 | None:
        """Return E[x^2] in the new coordinates, with tokens weighted, float32 [columns]."""
        return self._scaled(self._source.power(site), site)

    def importance(self, site: str) -> Float32 | None:
        """Return E[x^2] in the new coordinates, float32 [columns]."""
        return self._scaled(self._source.importance(site), site)

    def _scaled(self, given: Float32 | None, site: str) -> Float32 | None:
        return given if given is None or site not in self._factors else given / self._factors[site] ** 2

    def sensitivity(self, layer: int | None, role: str) -> Float32:
        """Return E[g^2] of each output in the new coordinates, float32 [rows]; divided outputs are more sensitive."""
        given, factor = self._source.sensitivity(layer, role), self._factors.get(output_place(layer, role))
        return given if factor is None else given * factor**2

    def lookups(self, table: str = "embedding") -> tuple[Float32, Float32]:
        """Return the values of the source: tables stay as they are."""
        return self._source.lookups(table)

    def ranges(self, place: str) -> ChannelRanges | None:
        """Return the ranges of a place in the new coordinates."""
        given = self._source.ranges(place)
        return given if given is None or place not in self._factors else given.over(self._factors[place])
