"""What each format of each matrix costs, and the choice that costs least within limits.

What a format costs in behaviour is predicted by the quadratic form of `exporter.calibrate.statistics` on some rows of
each matrix, with the error that the method expects there and what the runtime's own rounding adds. One format for each
matrix under limits of bytes and seconds is a multiple-choice knapsack problem, which HiGHS solves by branch and cut
(Huangfu and Hall 2018).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

import highspy
import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.second_moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.caldera import residual
from exporter.compress.effort import Effort
from exporter.compress.method import MatrixMethod, Method, load_method, spread_rows
from exporter.formats.format import Float32, LowRank, WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import ExporterError
from exporter.model.decoder import TOKENS
from exporter.model.model import Model

Float64 = NDArray[np.float64]
SAMPLED_ROWS = 32
SAMPLED_TABLE_ROWS = 1024
# The choice is no further than this share from the best there is, unless it takes more nodes than that to show it, some
# ten seconds for a model of 30 layers; the best so far is taken then. Nodes, since time would not be the same again.
GAP = 3e-3
MOST_NODES = 3000
# Limits are kept with no tolerance, so the solver's own is taken off them.
TOLERANCE = 1e-9
# Formats that cost so many times the least possible total never pay, and would only spoil the solver's scales.
DEAREST = 1e6


@dataclass(frozen=True)
class Storage:
    """Matrices that must have one format, the formats that they can have, and factors beside each of them."""

    groups: tuple[WeightGroup, ...]
    formats: tuple[WeightFormat, ...]
    low_rank: LowRank | None = None

    @classmethod
    def of(cls, decision: Decision) -> Self:
        """Return the storage of a matrix that has been decided on."""
        return cls((decision.group,), (decision.format,), decision.low_rank)


@dataclass(frozen=True)
class Choice:
    """A format for a storage and what it costs.

    Attributes:
        format: The format.
        bytes: Bytes in the file.
        kl: KL divergence a token, in nats, that it is predicted to add.
        decode_s: Seconds that the device is expected to spend on it for each token that it generates.
        prefill_s: The same for each token of a prompt.
    """

    format: WeightFormat
    bytes: int
    kl: float
    decode_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The most that all choices together may cost; see `Choice`."""

    bytes: float = math.inf
    kl: float = math.inf
    decode_s: float = math.inf
    prefill_s: float = math.inf


def predicted_choices(
    model: Model,
    storages: Sequence[Storage],
    method: Method,
    statistics: Statistics,
    progress: Callable[[int, int], None],
    methods: Mapping[str, MatrixMethod] = MappingProxyType({}),
    as_stored: Method | None = None,
) -> list[list[Choice]]:
    """Return the choices of each storage, from some rows of its matrices.

    Args:
        model: The source.
        storages: What there is to decide.
        method: Method that will encode.
        statistics: Of the model's inputs and outputs.
        progress: Called with storages done and their total.
        methods: Methods of single matrices, by name, in place of that one.
        as_stored: The method of matrices whose codes the format holds, in place of both; None for no other.
    """
    found = []
    for done, storage in enumerate(storages):
        progress(done, len(storages))
        parts = []
        for group in storage.groups:
            rows = _some_rows(group)
            own = methods.get(group.name)
            sample = _sampled(model, group, rows, statistics, storage.low_rank)
            parts.append((group.name, method if own is None else own.of_rows(rows), sample))
        choices = []
        for format in storage.formats:
            kl = 0.0
            for name, by, part in parts:
                kept = as_stored if as_stored is not None and model.has_codes(name, format) else by
                kl += part.kl(kept, format)
            choices.append(Choice(format, stored_bytes(storage, format), kl))
        found.append(choices)
    progress(len(storages), len(storages))
    return found


def with_predicted_kl(
    decisions: Sequence[Decision],
    given: Rewritten,
    evaluation: Statistics,
    effort: Effort,
    methods: Mapping[str, MatrixMethod],
    progress: Callable[[int, int], None],
) -> list[Decision]:
    """Return decisions with the KL divergence that each is predicted to add on both texts.

    Args:
        decisions: The decisions.
        given: The model in the coordinates that it is encoded in, and its statistics on the calibration text.
        evaluation: The statistics to predict the loss on the evaluation text with.
        effort: What a method spends.
        methods: Methods of single matrices, by name, in place of the one that the decision names.
        progress: Called with predictions done and their total.
    """
    methods_by_name = {name: load_method(name, effort) for name in dict.fromkeys(one.method for one in decisions)}
    predicted = []
    for before, statistics in ((0, given.statistics), (len(decisions), evaluation)):
        found = []
        for done, one in enumerate(decisions, before):
            progress(done, 2 * len(decisions))
            choices = predicted_choices(
                given.model, [Storage.of(one)], methods_by_name[one.method], statistics, silent, methods
            )
            found.append(choices[0][0].kl)
        predicted.append(found)
    progress(2 * len(decisions), 2 * len(decisions))
    return [
        replace(one, calibration_kl=first, predicted_kl=second)
        for one, first, second in zip(decisions, *predicted, strict=True)
    ]


@dataclass(frozen=True)
class _Sample:
    """Rows that stand for a matrix.

    Attributes:
        weight: float32 [rows, columns].
        left: What factors leave of it to be encoded, or all of it, float32 [rows, columns].
        site: What was seen of the inputs, or None for a table that is only looked up.
        rows: Sensitivity of each row as an output, scaled up to the whole matrix, float64 [rows].
        lookups: The same of each row as what is looked up, float64 [rows]; zeros where it is not.
        columns: Sensitivity of each column of what is looked up, float32 [columns]; zeros likewise.
    """

    weight: Float32
    left: Float32
    site: Site | None
    rows: Float64
    lookups: Float64
    columns: Float32

    def kl(self, method: Method, format: WeightFormat) -> float:
        """Return the KL divergence that a format is predicted to cause, the runtime's rounding included."""
        expected = method.expected_error(self.left, format, self.site, self.columns)
        kl = float(self.rows @ expected.outputs + self.lookups @ expected.lookups)
        return kl / 2 + self._rounding_kl(format)

    def _rounding_kl(self, format: WeightFormat) -> float:
        """Return what it costs that the runtime rounds the inputs to 8 bits, block by block.

        Within a block the error of each input is even over a step of max |x| / 127, its variance a twelfth of that
        squared.
        """
        block = format.activation_block
        if self.site is None or block is None:
            return 0.0
        # A format's blocks divide the columns, so the peaks of its blocks were observed.
        variance = np.repeat(self.site.peaks[block], block) / (127**2 * 12)
        return float(self.rows @ (self.weight**2 @ variance)) / 2


def _some_rows(group: WeightGroup) -> NDArray[np.int64]:
    """Return rows that stand for a matrix."""
    return spread_rows(group.rows, SAMPLED_TABLE_ROWS if group.layer is None else SAMPLED_ROWS)


def _sampled(
    model: Model,
    group: WeightGroup,
    chosen: NDArray[np.int64],
    statistics: Statistics,
    low_rank: LowRank | None,
) -> _Sample:
    rows, lookups, columns = np.zeros(len(chosen)), np.zeros(len(chosen)), np.zeros(group.columns, np.float32)
    if group.site != TOKENS:
        rows = _scaled_up(statistics.sensitivity(group.layer, "head" if group.layer is None else group.part), chosen)
    if "embedding" in group.uses:
        frequencies, columns = statistics.lookups(group.role)
        lookups = _scaled_up(frequencies[group.first_row :][: group.rows], chosen)
    site = statistics.site(group.site)
    if low_rank is not None and site is not None:
        whole = model.read(group.name)
        left = residual(whole, low_rank.rank, site, statistics.sensitivity(group.layer, group.part))[chosen]
        return _Sample(whole[chosen], left, site, rows, lookups, columns)
    weight = model.read_rows(group.name, chosen)
    return _Sample(weight, weight, site, rows, lookups, columns)


def _scaled_up(values: Float32, chosen: NDArray[np.int64]) -> Float64:
    """Return some of the values, float64, scaled so that they sum to what all of them do."""
    part: Float64 = values[chosen].astype(np.float64)
    part *= float(values.sum(dtype=np.float64)) / max(float(part.sum()), 1e-300)
    return part


def stored_bytes(storage: Storage, format: WeightFormat) -> int:
    """Return the bytes of a storage in a format."""
    beside = storage.low_rank
    return sum(
        format.stored_bytes(group.rows, group.columns)
        + (beside.stored_bytes(group.rows, group.columns) if beside else 0)
        for group in storage.groups
    )


def allocate(
    choices: Sequence[Sequence[Choice]], limits: Limits, cost: Callable[[Choice], float] = lambda choice: choice.kl
) -> list[Choice] | None:
    """Return one choice for each storage, of the least total cost within limits, or None where nothing is within them.

    Args:
        choices: What each storage may have.
        limits: What all of them together may take.
        cost: What is to be least: a non-negative number for a choice.
    """
    costs = [np.array([cost(choice) for choice in some]) for some in choices]
    scale = sum(float(one.min()) for one in costs) or 1.0
    allowed = [one <= max(DEAREST * scale, float(one.min())) for one in costs]
    rows, bounds = [], []
    for name, limit in vars(limits).items():
        if math.isinf(limit):
            continue
        used = [np.array([float(getattr(choice, name)) for choice in some]) for some in choices]
        left = limit - sum(float(one.min()) for one in used)
        if left < 0:
            return None
        above = [one - one.min() for one in used]
        allowed = [may & (one <= left) for may, one in zip(allowed, above, strict=True)]
        rows.append(np.concatenate(above) / (left or 1.0))
        bounds.append(1.0 - 2 * TOLERANCE)
    if not all(may.any() for may in allowed):
        return None
    kept = np.concatenate(allowed)
    found = _solve(
        np.concatenate(costs)[kept] / scale,
        np.array([row[kept] for row in rows]).reshape(len(rows), kept.sum()),
        np.array(bounds),
        [int(may.sum()) for may in allowed],
    )
    if found is None:
        return None
    offered = [
        [one for one, may in zip(some, mask, strict=True) if may] for some, mask in zip(choices, allowed, strict=True)
    ]
    return [some[index] for some, index in zip(offered, found, strict=True)]


def _solve(costs: Float64, used: Float64, bounds: Float64, counts: list[int]) -> list[int] | None:
    """Return the index of one choice of each storage; None where no choice keeps the bounds.

    Args:
        costs: float64 [choices], one storage's after the other's.
        used: float64 [bounds, choices].
        bounds: The most that may be used, float64 [bounds].
        counts: Choices of each storage.
    """
    total, owner = len(costs), np.repeat(np.arange(len(counts)), counts)
    problem = highspy.HighsLp()
    problem.num_col_, problem.num_row_ = total, len(bounds) + len(counts)
    problem.col_cost_, problem.col_lower_, problem.col_upper_ = costs, np.zeros(total), np.ones(total)
    problem.integrality_ = [highspy.HighsVarType.kInteger] * total
    problem.row_lower_ = np.concatenate([np.full(len(bounds), -highspy.kHighsInf), np.ones(len(counts))])
    problem.row_upper_ = np.concatenate([bounds, np.ones(len(counts))])
    # Every choice uses something of every bound and is one of its storage's.
    entries = len(bounds) + 1
    matrix = problem.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kColwise
    matrix.start_ = np.arange(0, entries * total + 1, entries)
    matrix.index_ = np.column_stack([np.tile(np.arange(len(bounds)), (total, 1)), len(bounds) + owner]).ravel()
    matrix.value_ = np.vstack([used, np.ones((1, total))]).T.ravel()
    solver = highspy.Highs()
    solver.silent()
    for option, value in {
        "threads": 1, "mip_rel_gap": GAP, "mip_abs_gap": 0.0, "mip_feasibility_tolerance": TOLERANCE,
        "primal_feasibility_tolerance": TOLERANCE, "mip_max_nodes": MOST_NODES,
    }.items():  # fmt: skip
        solver.setOptionValue(option, value)
    solver.passModel(problem)
    solver.run()
    limit = highspy.HighsModelStatus.kSolutionLimit
    if solver.getModelStatus() == limit and not solver.getSolution().value_valid:
        # Nodes are up before anything was found that keeps the bounds: whether something does has to be known.
        solver.setOptionValue("mip_max_nodes", highspy.kHighsIInf)
        solver.run()
    status = solver.getModelStatus()
    if status == highspy.HighsModelStatus.kInfeasible:
        return None
    if status not in (highspy.HighsModelStatus.kOptimal, limit):
        raise ExporterError("HiGHS found no choice of formats", got=solver.modelStatusToString(status))
    taken = np.array(solver.getSolution().col_value)
    ends = np.cumsum(counts)
    return [int(taken[end - count : end].argmax()) for end, count in zip(ends, counts, strict=True)]
