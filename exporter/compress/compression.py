"""Compresses a model: encodes every matrix as decided, one at a time, in the order of the decoder's computation."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.second_moments import Site as SiteStatistics
from exporter.calibrate.statistics import Statistics
from exporter.calibrate.windows import Tokens, Windows
from exporter.compress.caldera import ALTERNATION, Alternation, encode_with_factors
from exporter.compress.effort import EFFORTS, Effort
from exporter.compress.error_propagation import SiteErrors, propagated_errors
from exporter.compress.method import Method, load_method, method_kind, relative_error
from exporter.compress.methods.as_stored import AsStored
from exporter.formats.format import EncodedFactors, EncodedMatrix, Float32, LowRank
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.allocator import give_back_freed_memory
from exporter.foundation.errors import RequestError
from exporter.model.blocks import Site
from exporter.model.model import Model, tokens_of

DIGESTED_ROWS_AT_ONCE = 1024
# The method that gives factors their codes, whatever gives the matrices theirs.
FACTORS = "ldlq"


@dataclass(frozen=True)
class MatrixOutcome:
    """The result of compressing one matrix.

    Attributes:
        planned_sha256: SHA-256 of the planned weights, factors of an adapter included, float32, rows in the source's
            order.
        output_error: Relative squared error of the outputs on the calibration text (of the weights where the
            inputs were not observed); None where the outputs are all zero.
    """

    planned_sha256: str
    output_error: float | None


@dataclass(frozen=True)
class CompressedMatrix:
    """One matrix, compressed.

    Attributes:
        decision: What was decided on it.
        encoded: Its codes, its planned weights, and its factors if some were fitted.
        outcome: What the report says of it.
        adapter: Factors of an adapter beside it; None for none. The planned weights are those without it.
    """

    decision: Decision
    encoded: EncodedMatrix
    outcome: MatrixOutcome
    adapter: EncodedFactors | None = None

    @property
    def factors(self) -> EncodedFactors | None:
        """The factors that are stored with it, fitted or given; None for none."""
        return self.encoded.factors or self.adapter

    @property
    def name(self) -> str:
        """Its name in the source."""
        return self.decision.group.name


@dataclass(frozen=True)
class Compression:
    """What is to be compressed, and how.

    Attributes:
        model: The model in the shape and coordinates in which it is compressed; decisions and statistics are of it.
        decided: A decision for each weight group.
        statistics: Statistics of the inputs; None if no method and no format needs them.
        effort: How much work the methods do.
        alternation: How matrices and their factors alternate where a decision has factors.
        methods: Methods of single matrices, by name, instead of the one that the decision names.
        propagation_text: Windows, int64 [windows, length], on which matrices compensate for the errors of earlier
            ones; None if they do not.
        source: The model that the result is compared with: before it was rewritten, or with an adapter merged that is
            kept beside `model`. None for `model`.
    """

    model: Model
    decided: Sequence[Decision]
    statistics: Statistics | None = None
    effort: Effort = EFFORTS["balanced"]
    alternation: Alternation = ALTERNATION
    methods: Mapping[str, Method] = field(default_factory=dict)
    propagation_text: Tokens | None = None
    source: Model | None = None

    @property
    def original(self) -> Model:
        """The model that the result is compared with."""
        return self.source or self.model

    @cached_property
    def decisions(self) -> dict[str, Decision]:
        """Name of each matrix -> its decision."""
        return {decision.group.name: decision for decision in self.decided}

    def ranges(self, place: str) -> ChannelRanges:
        """Return the ranges of the channels of a place; see `exporter.calibrate.statistics`.

        Raises:
            RequestError: they were not observed.
        """
        found = None if self.statistics is None else self.statistics.ranges(place)
        if found is None:
            raise RequestError("the ranges of the activations were not observed", where=place)
        return found


def compress(
    compression: Compression, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[CompressedMatrix]:
    """Compress every matrix of a model, in the order of its computation.

    Args:
        compression: What to compress, and how.
        progress: Called after each matrix with the number of those done and the total.

    Raises:
        InputError: a matrix holds NaN or infinity, or activations are not finite.
        RequestError: weights are so small that their format makes every one of them zero.
    """
    for done, matrix in enumerate(_compressed(compression), 1):
        give_back_freed_memory()
        progress(done, len(compression.decisions))
        yield matrix


def _compressed(compression: Compression) -> Iterator[CompressedMatrix]:
    encoder, decoder, tokens = _Encoder(compression), compression.model.decoder, compression.propagation_text
    looked_up: dict[str, list[Float32]] = {}
    for part in decoder.tables:
        table = encoder.compressed(part)
        if tokens is not None:
            rows = table.encoded.planned[tokens_of(part, np.unique(tokens))]
            looked_up.setdefault(part.role, []).append(rows)
        yield table
        del table
    if tokens is None:
        yield from (encoder.compressed(one.group) for site in decoder.sites.values() for one in site.linears)
    else:
        rows_of_tables = [np.concatenate(parts) for parts in looked_up.values()]
        yield from _compensating(encoder, propagated_errors(compression.model, tokens, rows_of_tables))
    if not decoder.tied:
        yield encoder.compressed(decoder.head)


def _compensating(encoder: "_Encoder", sites: Iterator[tuple[Site, SiteErrors]]) -> Iterator[CompressedMatrix]:
    """Compress the matrices of each site so that they compensate for the errors of earlier ones."""
    for site, errors in sites:
        for linear in site.linears:
            weight = errors.weight(linear)
            kept = linear.group.exact or encoder.takes_codes(linear.group)
            wanted = weight if kept else errors.compensated(weight)
            matrix = encoder.compressed(linear.group, weight, wanted)
            errors.follow(linear, matrix.encoded.planned)
            yield matrix


class _Encoder:
    """Encodes the matrices of a model as decided."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        named = {FACTORS, *(one.method for one in compression.decided)}
        self._methods = {name: load_method(name, compression.effort) for name in named}

    def takes_codes(self, group: WeightGroup) -> bool:
        """Say whether a matrix takes the codes of the source."""
        return self._methods[self._compression.decisions[group.name].method].keeps_codes

    def compressed(
        self, group: WeightGroup, weight: Float32 | None = None, wanted: Float32 | None = None
    ) -> CompressedMatrix:
        """Compress one matrix.

        Args:
            group: Its name and shape.
            weight: The source's, float32 [rows, columns]; not changed. It is read if it is None.
            wanted: What is encoded in its place, to compensate for the errors of earlier matrices; None for `weight`.
        """
        weight = self._compression.model.read(group.name) if weight is None else weight
        decision = self._compression.decisions[group.name]
        statistics = self._compression.statistics
        site = None if statistics is None else statistics.site(group.site)
        encoded = self._encoded(decision, weight if wanted is None else wanted, site)
        if weight.any() and not encoded.planned.any():
            raise RequestError(
                f"{decision.format.name} makes every weight zero",
                where=group.name,
                got=f"weights of at most {np.abs(weight).max():.3g}",
                next_step="choose a type that holds float32, such as F32, or for ONNX int4-b32-f32",
            )
        second_moment = None if site is None else site.second_moment
        error = relative_error(weight, encoded.planned, second_moment)
        adapter = None if decision.adapter is None else self._given(group, decision.adapter)
        whole = encoded.planned if adapter is None else adapter.added_to(encoded.planned)
        return CompressedMatrix(decision, encoded, MatrixOutcome(weights_digest(whole), error), adapter)

    def _given(self, group: WeightGroup, stored: LowRank) -> EncodedFactors:
        """Return the factors of an adapter beside a matrix."""
        left, right = self._compression.model.factors(group.name)
        encode = stored.format.encode_rows
        return EncodedFactors(stored, encode(left, None), encode(right, None))

    def _encoded(self, decision: Decision, weight: Float32, site: SiteStatistics | None) -> EncodedMatrix:
        method = self._compression.methods.get(decision.group.name, self._methods[decision.method])
        if self.takes_codes(decision.group):
            method = AsStored(self._compression.model, decision.group.name)
        if decision.low_rank is None:
            return method.encode(weight, decision.format, site)
        statistics = self._compression.statistics
        if statistics is None or site is None:
            raise RequestError(
                "factors cannot be fitted to inputs that were not observed",
                where=decision.group.name,
                next_step="collect statistics first",
            )
        outputs = statistics.sensitivity(decision.group.layer, decision.group.part)
        return encode_with_factors(
            weight, decision.format, decision.low_rank, site, outputs, method,
            self._compression.alternation, self._methods[FACTORS],
        )  # fmt: skip


def propagates_errors(effort: Effort, decisions: Sequence[Decision]) -> bool:
    """Say whether matrices compensate for the errors of earlier ones.

    They are where every one has codes that are fitted to its inputs and no factors, and some have less than 16 bits.
    """
    chosen = [(one, method_kind(one.method)) for one in decisions]
    encoded = [(one, method) for one, method in chosen if not method.keeps_codes]
    fitted = all(method.supports_error_propagation and one.low_rank is None for one, method in encoded)
    rounded = any(one.format.stored_bytes(1, 256) < 2 * 256 for one, _ in encoded)
    return effort.propagates_errors and fitted and rounded


def propagation_text(effort: Effort, decisions: Sequence[Decision], calibration: Windows) -> Tokens | None:
    """Return the windows that errors are propagated on, int64 [windows, length]; None where they do not."""
    return calibration.tokens if propagates_errors(effort, decisions) else None


def weights_digest(weight: Float32) -> str:
    """Return the SHA-256 of weights, float32 [rows, columns], with -0 counted as 0."""
    digest = hashlib.sha256()
    for first in range(0, len(weight), DIGESTED_ROWS_AT_ONCE):
        digest.update(np.ascontiguousarray(weight[first : first + DIGESTED_ROWS_AT_ONCE] + np.float32(0)).data)
    return digest.hexdigest()
