"""How far predicted speeds are from published ones: `python -m tests.benchmarks.scores` prints a table.

Rows of chips that a fit has not seen, each with the coefficients of the others; and rows published later, and rows held
back, with the coefficients that ship.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp

import numpy as np

from exporter.predict.coefficients import Part, fitted
from exporter.predict.estimate import EIGHTY_PERCENT
from exporter.predict.gaussian_process import Point, residual
from exporter.predict.rates import MEASURED_NOISE
from tests.benchmarks.fitting import HeldOut, held_out, samples
from tests.benchmarks.published import FIRST_OF_LATER, Row, held_back, published, vendor

# A device counts with a measured point where it has so many other rows.
OTHERS_FOR_DECODE, OTHERS_FOR_PREFILL = 2, 1


@dataclass(frozen=True)
class Scored:
    """A predicted speed beside the published one.

    Attributes:
        row: The published run.
        error: Of the speed, as a share of the published one.
        predicted: Over the published speed.
        inside: Whether the published speed is within the interval of 80 %.
        weight: Of the row; with a measured point each row is predicted from every other in turn, and counts once.
    """

    row: Row
    predicted: float
    inside: bool
    weight: float = 1.0

    @property
    def error(self) -> float:
        return abs(self.predicted - 1)


@dataclass(frozen=True)
class Trial:
    """All rows of a part with what is predicted for each from the rows of other chips."""

    part: Part
    rows: list[Row]
    held: list[HeldOut]


@cache
def trial(part: Part) -> Trial:
    """Predict every published speed of a part from the rows of all chips but its own."""
    rows = [row for row in published() if samples([row], part)]
    return Trial(part, rows, held_out(samples(rows, part), part))


def shipped(part: Part, among: Iterable[Row]) -> Trial:
    """Predict published speeds with the coefficients that ship."""
    rows, model = [row for row in among if samples([row], part)], getattr(fitted(), part)
    found = samples(rows, part)
    return Trial(part, rows, [HeldOut(one, one.log_time - model.log_milliseconds(one.terms), model) for one in found])


def from_facts(tried: Trial) -> list[Scored]:
    """Return the rows as predicted from facts of the device alone."""
    return [_scored(row, one, []) for row, one in zip(tried.rows, tried.held, strict=True)]


def class_medians(tried: Trial) -> list[float]:
    """Return the errors of a plain roofline: the median share of the peak that other chips of the class draw."""
    errors = []
    for row in tried.rows:
        others = [one for one in tried.rows if one.soc != row.soc]
        own = [one for one in others if one.device_class == row.device_class] or others
        share = float(np.median([_share(one) for one in own]))
        errors.append(abs(share / _share(row) - 1))
    return errors


def _share(row: Row) -> float:
    return row.decode * row.work.file_bytes / row.work.bandwidth_bytes_per_s


def by_vendor(tried: Trial) -> Trial:
    """Predict the same speeds from the rows of all vendors of chips but its own."""
    found = [one.sample for one in tried.held]
    return replace(tried, held=held_out(found, tried.part, lambda one: vendor(one.soc)))


def from_one_point(
    tried: Trial, of: Callable[[Row], Hashable], others: int, wanted: Callable[[Row], bool] = lambda row: True
) -> list[Scored]:
    """Return the wanted rows as predicted with one row measured, in turn each one that `of` puts together."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for place, row in enumerate(tried.rows):
        groups[of(row)].append(place)
    scored = []
    for group in groups.values():
        if len(group) > others:
            weight = 1 / (len(group) - 1)
            for place in filter(lambda place: wanted(tried.rows[place]), group):
                for known in group:
                    if known != place:
                        point = tried.held[known]
                        measured = Point(point.sample.work, point.error, MEASURED_NOISE)
                        scored.append(_scored(tried.rows[place], tried.held[place], [measured], weight))
    return scored


def of_device(row: Row) -> Hashable:
    """Return what one measured point of decoding is about."""
    return row.place


def of_kernels(row: Row) -> Hashable:
    """Return what one measured point of prefill is about: a device and the kernels of one program."""
    return (*row.place, row.work.family, row.work.runtime)


def quantile(scored: Sequence[Scored], share: float) -> float:
    """Return the error that a share of the rows stays below."""
    ordered = sorted(scored, key=lambda one: one.error)
    reached = np.cumsum([one.weight for one in ordered])
    return ordered[int(np.searchsorted(reached, share * reached[-1]))].error


def coverage(scored: Sequence[Scored]) -> float:
    """Return the share of the rows that is within its interval."""
    return float(np.average([one.inside for one in scored], weights=[one.weight for one in scored]))


def by_class(scored: Iterable[Scored]) -> dict[str, list[Scored]]:
    """Return the rows by class of device, the worst median first."""
    classes: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        classes[one.row.device_class].append(one)
    return dict(sorted(classes.items(), key=lambda item: -quantile(item[1], 0.5)))


def _scored(row: Row, one: HeldOut, points: Sequence[Point], weight: float = 1.0) -> Scored:
    off = residual(one.sample.work, points, one.fitted)
    left = one.error - off.mean
    return Scored(row, exp(left), abs(left) <= EIGHTY_PERCENT * off.deviation, weight)


def factor(scored: Sequence[Scored]) -> float:
    """Return the median of predicted and published speed, the larger over the smaller."""
    return float(np.median([max(one.predicted, 1 / one.predicted) for one in scored]))


def table() -> str:
    """Return the scores by what a prediction has not seen, as a table in Markdown."""
    lines = ["| speed | rows | not seen | known | number | median error | 90th percentile | factor | within 80 % |"]
    lines += ["| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for part, of, others in (("decode", of_device, OTHERS_FOR_DECODE), ("prefill", of_kernels, OTHERS_FOR_PREFILL)):
        chip = trial(part)
        for unseen, tried in (("chip", chip), ("vendor", by_vendor(chip))):
            facts, point = from_facts(tried), from_one_point(tried, of, others)
            for name, wanted in GROUPS.items() if unseen == "chip" else [("all", GROUPS["all"])]:
                for known, scored in (("facts", facts), ("one run", point)):
                    own = [one for one in scored if wanted(one.row)]
                    lines += [_line(part, name, unseen, known, own)] if own else []
        kept = set(held_back())
        seen = shipped(part, [*published(), *held_back()])
        facts = [one for one in from_facts(seen) if one.row in kept]
        lines.append(_line(part, "held back", "row", "facts", facts))
        lines.append(_line(part, "held back", "row", "one run", from_one_point(seen, of, others, kept.__contains__)))
    return "\n".join(lines)


GROUPS: dict[str, Callable[[Row], bool]] = {
    "all": lambda row: True,
    "collected first": lambda row: row.number < FIRST_OF_LATER,
    "collected later": lambda row: row.number >= FIRST_OF_LATER,
    "neural processors": lambda row: row.work.kind == "npu",
    "Hexagon, w4a16": lambda row: row.work.backend == "npu:htp" and row.work.is_compiled,
    "Intel's GPUs": lambda row: row.work.kind == "gpu" and row.work.is_intel,
}


def _line(part: str, name: str, unseen: str, known: str, scored: Sequence[Scored]) -> str:
    number = len({one.row.number for one in scored})
    errors = " | ".join(f"{quantile(scored, share):.1%}" for share in (0.5, 0.9))
    inside = f"{factor(scored):.2f} | {coverage(scored):.0%}"
    return f"| {part} | {name} | {unseen} | {known} | {number} | {errors} | {inside} |"


if __name__ == "__main__":
    print(table())
