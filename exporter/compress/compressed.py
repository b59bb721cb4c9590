"""A compressed model: decisions, and the encoded matrices that follow from them, made one at a time."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.calibrate.windows import Tokens, Windows
from exporter.compress.caldera import ALTERNATION, Alternation, encode_with_factors
from exporter.compress.effort import EFFORTS, Effort
from exporter.compress.error_propagation import ErrorPropagation
from exporter.compress.method import Method, load_method, method_kind, relative_error
from exporter.formats.format import EncodedMatrix, Float32, LowRank, WeightFormat
from exporter.formats.group import Decision
from exporter.foundation.allocator import give_back_freed_memory
from exporter.foundation.errors import RequestError
from exporter.model.families import EMBEDDING, LINEARS
from exporter.model.model import Model

DIGESTED_ROWS_AT_ONCE = 1024
# The method that gives factors their codes, whatever gives the matrices theirs.
FACTORS = "ldlq"


@dataclass(frozen=True)
class MatrixOutcome:
    """What became of one matrix.

    Attributes:
        planned_sha256: SHA-256 of the planned weights, float32, rows in the source's order.
        output_error: Relative squared error of the outputs on the calibration text (of the weights where the
            inputs were not observed); None where the outputs are all zero.
    """

    planned_sha256: str
    output_error: float | None


class CompressedModel:
    """The matrices of a model in the formats decided on; each is encoded when the target asks for it.

    Args:
        model: The source, which it is compared with.
        decisions: One for each weight group.
        statistics: What was seen of the inputs; None where no method and no format needs them.
        effort: How much work the methods do.
        encoded: Called after each matrix with its number and the total.
        rewritten: The source in the shape and coordinates that it is compressed in, which decisions and statistics
            are of; None for its own.
        alternation: How matrices and their factors alternate where a decision has factors.
        methods: Methods of single matrices, by name, instead of the one that the decision names.
        propagation_text: Windows, int64 [windows, length], on which matrices compensate for the errors of earlier
            ones; they must then be encoded in the order of computation. None: they do not.
    """

    def __init__(
        self,
        model: Model,
        decisions: list[Decision],
        statistics: Statistics | None,
        effort: Effort = EFFORTS["balanced"],
        encoded: Callable[[int, int], None] = lambda done, total: None,
        rewritten: Model | None = None,
        alternation: Alternation = ALTERNATION,
        methods: Mapping[str, Method] = MappingProxyType({}),
        propagation_text: Tokens | None = None,
    ) -> None:
        self.model = model
        self.rewritten = rewritten or model
        self.decisions = {decision.group.name: decision for decision in decisions}
        self.outcomes: dict[str, MatrixOutcome] = {}
        self._statistics = statistics
        self._methods = {name: load_method(name, effort) for name in {FACTORS, *(one.method for one in decisions)}}
        self._own_methods = methods
        self._encoded = encoded
        self._turns = alternation
        self._propagation = (
            None if propagation_text is None else ErrorPropagation(self.rewritten, propagation_text, self._embedded)
        )

    def encode(self, name: str) -> EncodedMatrix:
        """Read, compress and return one matrix; its outcome is kept.

        Raises:
            InputError: the matrix holds NaN or infinity.
            RequestError: its weights are so small that the format makes every one of them zero.
        """
        decision = self.decisions[name]
        weight = self.rewritten.read(name)
        site = self._site(decision)
        wanted = weight if self._propagation is None else self._propagation.wanted(decision.group, weight)
        matrix = self._matrix(decision, wanted, site)
        if weight.any() and not matrix.planned.any():
            raise RequestError(
                f"{decision.format.name} makes every weight zero",
                where=name,
                got=f"weights of at most {np.abs(weight).max():.3g}",
                next_step="choose a type that holds float32, such as F32, or for ONNX int4-b32-f32",
            )
        second_moment = None if site is None else site.second_moment
        self.outcomes[name] = MatrixOutcome(
            weights_digest(matrix.planned), relative_error(weight, matrix.planned, second_moment)
        )
        if self._propagation is not None:
            self._propagation.follow(decision.group, matrix.planned)
        give_back_freed_memory()
        self._encoded(len(self.outcomes), len(self.decisions))
        return matrix

    def _embedded(self, tokens: Tokens) -> Float32:
        """Return what the encoded table gives for tokens, float32 [..., hidden]: rows do not depend on each other."""
        decision = self.decisions[EMBEDDING]
        used, places = np.unique(tokens, return_inverse=True)
        rows = self._matrix(decision, self.rewritten.read(EMBEDDING)[used], self._site(decision)).planned
        return rows[places.reshape(tokens.shape)]

    def _matrix(self, decision: Decision, weight: Float32, site: Site | None) -> EncodedMatrix:
        method = self._own_methods.get(decision.group.name, self._methods[decision.method])
        if decision.low_rank is None:
            return method.encode(weight, decision.format, site)
        if self._statistics is None or site is None:
            raise RequestError(
                "factors cannot be fitted to inputs that were not observed",
                where=decision.group.name,
                next_step="collect statistics first",
            )
        outputs = self._statistics.sensitivity(decision.group.layer, decision.group.role)
        return encode_with_factors(
            weight, decision.format, decision.low_rank, site, outputs, method, self._turns, self._methods[FACTORS]
        )

    def vector(self, name: str) -> Float32:
        """Return a norm or bias, which stays as it is."""
        return self.rewritten.read(name)

    def ranges(self, place: str) -> ChannelRanges:
        """Return the ranges of the channels of a place; see `exporter.calibrate.statistics`.

        Raises:
            RequestError: they were not observed.
        """
        found = None if self._statistics is None else self._statistics.ranges(place)
        if found is None:
            raise RequestError("the ranges of the activations were not observed", where=place)
        return found

    def _site(self, decision: Decision) -> Site | None:
        return None if self._statistics is None else self._statistics.site(decision.group.site)


def propagates_errors(effort: Effort, decisions: Sequence[Decision]) -> bool:
    """Say whether matrices compensate for the errors of earlier ones.

    They are where every one has codes that are fitted to its inputs and no factors, and some have less than 16 bits.
    """
    fitted = all(method_kind(one.method).supports_error_propagation and one.low_rank is None for one in decisions)
    rounded = any(one.format.stored_bytes(1, 256) < 2 * 256 for one in decisions)
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


def with_factors(decisions: list[Decision], low_rank: LowRank, roles: Collection[str] = LINEARS) -> list[Decision]:
    """Return decisions with factors beside the matrices of some roles, and a reason that says so.

    Raises:
        RequestError: one of the matrices cannot carry them; see `check_formats`.
    """
    changed = [
        replace(one, low_rank=low_rank, reason=f"{one.reason}; low-rank factors {low_rank.name} beside it")
        if one.group.role in roles
        else one
        for one in decisions
    ]
    check_formats(changed)
    return changed


def check_methods(decisions: list[Decision]) -> None:
    """Refuse methods that choose no codes in the formats decided on, and formats that need what is not observed.

    Raises:
        RequestError: the first of them.
    """
    for name, format in dict.fromkeys((one.method, one.format) for one in decisions):
        load_method(name, EFFORTS["balanced"]).require(format)
    for one in decisions:
        if one.group.site == "tokens" and getattr(one.format, "needs_importance", False):
            raise RequestError(
                f"{one.format.name} needs the importance of inputs, and rows that are looked up have none",
                where=one.group.name,
                expected="another type for the embedding",
                next_step="choose a named mix such as IQ2_M, or another type",
            )


def check_formats(decisions: list[Decision], others: Iterable[WeightFormat] = ()) -> None:
    """Refuse formats that cannot hold their matrices.

    Args:
        decisions: One for each weight group.
        others: Formats of which one that holds them all may be chosen instead.

    Raises:
        RequestError: a matrix's width does not fit its format, or its factors fit neither it nor their format.
    """
    for decision in decisions:
        if not decision.format.fits(decision.group.columns):
            raise RequestError(
                f"{decision.format.name} cannot hold rows of {decision.group.columns} weights",
                where=decision.group.name,
                expected=f"a multiple of {decision.format.block_columns}",
                next_step=_other_type({one.group.columns for one in decisions}, others),
            )
    with_low_rank = [(one, one.low_rank) for one in decisions if one.low_rank is not None]
    # The narrowest first: what it is told to take, all others can.
    for decision, low_rank in sorted(with_low_rank, key=lambda pair: min(pair[0].group.rows, pair[0].group.columns)):
        _check_factors(decision, low_rank)


def _other_type(widths: Collection[int], formats: Iterable[WeightFormat]) -> str:
    fitting = [format.name for format in formats if all(map(format.fits, widths))]
    return f"choose another type, such as {fitting[0]}" if fitting else "choose a type for floats, or another target"


def _check_factors(decision: Decision, low_rank: LowRank) -> None:
    group = decision.group
    if group.layer is None:
        raise RequestError(
            "embedding and head carry no factors",
            where=group.name,
            got=low_rank.name,
            expected="factors beside matrices of the layers; llama.cpp dies of an adapter of a tied embedding",
            next_step="leave these roles out",
        )
    if decision.format.block_columns == 1:
        raise RequestError(
            f"factors beside {decision.format.name} would only take room",
            where=group.name,
            next_step="choose a type of fewer bits",
        )
    most = min(group.rows, group.columns)
    if not 0 < low_rank.rank <= most:
        raise RequestError(
            "the rank is not one that the matrix has", where=group.name, got=low_rank.rank, expected=f"1 to {most}"
        )
    for size in (low_rank.rank, group.columns):
        if not low_rank.format.fits(size):
            raise RequestError(
                f"factors in {low_rank.format.name} cannot have rows of {size} weights",
                where=group.name,
                expected=f"a multiple of {low_rank.format.block_columns}",
                next_step="choose another rank, or 16 bits for factors",
            )
