"""Refuses decisions that cannot be encoded, before a weight is read; and the factors that decisions may have."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from exporter.compress.effort import EFFORTS
from exporter.compress.method import load_method, method_kind
from exporter.formats.format import LowRank, WeightFormat
from exporter.formats.group import Decision
from exporter.foundation.errors import RequestError
from exporter.model.decoder import TOKENS
from exporter.model.model import Model


def with_factors(decisions: list[Decision], low_rank: LowRank, roles: Collection[str] | None = None) -> list[Decision]:
    """Return decisions with factors beside the matrices of some roles, or of all layers, and a reason that says so.

    Raises:
        RequestError: one of the matrices cannot carry them; see `check_formats`.
    """
    changed = [
        replace(one, low_rank=low_rank, reason=f"{one.reason}; low-rank factors {low_rank.name} beside it")
        if (one.group.layer is not None if roles is None else one.group.role in roles)
        else one
        for one in decisions
    ]
    check_formats(changed)
    return changed


def check_methods(decisions: list[Decision], model: Model) -> None:
    """Refuse methods that choose no codes in the formats decided on, and formats that need what is not observed.

    Args:
        decisions: The decisions.
        model: The model that they are of.

    Raises:
        RequestError: the first of them.
    """
    for name, format in dict.fromkeys((one.method, one.format) for one in decisions):
        load_method(name, EFFORTS["balanced"]).require(format)
    for one in decisions:
        if method_kind(one.method).keeps_codes:
            _require_codes(one, model)
        if one.group.site == TOKENS and getattr(one.format, "needs_importance", False):
            raise RequestError(
                f"{one.format.name} needs the importance of inputs, and rows that are looked up have none",
                where=one.group.name,
                expected="another type for the embedding",
                next_step="choose a named mix such as IQ2_M, or another type",
            )


def _require_codes(decision: Decision, model: Model) -> None:
    """Refuse a matrix whose codes are not the source's; of floats, the weights are read, since they may be integers."""
    name, format = decision.group.name, decision.format
    held = model.stored_type(name)
    if model.has_codes(name, format) or (held is None and model.codes(name, format) is not None):
        return
    raise RequestError(
        f"the source holds no codes of the type {format.name}", where=name, got=held or "floats",
        next_step="choose another method, or a type that it holds",
    )  # fmt: skip


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
