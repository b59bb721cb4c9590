"""The coefficients of predicted speeds, fitted to published ones: `python -m tests.benchmarks.fitting` writes them.

Robust (pseudo-Huber) regression on the logarithm of the time, each coefficient drawn to a value expected beforehand.
A chip with many rows counts as the root of their number, so that no device decides what all others get.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import exporter.predict
from exporter.predict.coefficients import FILE, UNKNOWN, Coefficients, Part
from exporter.predict.estimate import EIGHTY_PERCENT
from exporter.predict.token_cost import Term, decode_terms, prefill_terms, program_of
from exporter.predict.workload import Workload
from tests.benchmarks.published import Row, log_milliseconds, published

Array = NDArray[np.float64]
PARTS: tuple[Part, ...] = ("decode", "prefill")
# Errors are counted in these, and a chip's rows as so many; ten steps suffice from any start.
NOISE, ROWS_OF_A_SOC, STEPS = 0.2, 3.0, 20

# How far devices are off: what is expected of a kind of processor of which nothing is known, counted as so many chips,
# and what two formats, two sizes and two runs of one device differ by beside that.
SPREADS_OF_UNKNOWN: dict[Part, float] = {"decode": 0.3, "prefill": 0.8}
UNKNOWN_SOCS = 4.0
FAMILY_SPREAD: dict[Part, float] = {"decode": 0.05, "prefill": 0.2}
PROGRAM_SPREAD: dict[Part, float] = {"decode": 0.05, "prefill": 0.15}
SIZE_SPREAD: dict[Part, float] = {"decode": 0.05, "prefill": 0.15}
RUN_NOISE: dict[Part, float] = {"decode": 0.05, "prefill": 0.12}
LEAST_SPREAD, LEAST_NOISE = 0.05, 0.03
# One chip that is off by more does not widen the intervals of all others.
MOST_SPREAD: dict[Part, float] = {"decode": 0.5, "prefill": 1.2}

# What is expected of a coefficient before a row is read, and how far it may be off. The first that fits counts.
DECODE_PRIORS: tuple[tuple[str, float, float], ...] = (
    (r"reading$", log(1 / 0.65), 0.5),  # two thirds of the peak
    (r"reading cpu without dot", log(2), 0.3),  # the arithmetic of 4-bit weights without dot products binds
    (r"reading opencl k", 0.35, 0.2),  # "not optimized" and
    (r"reading opencl low", 0.7, 0.3),  # not supported, by llama.cpp's docs/backend/OPENCL.md
    (r"reading intel vulkan", log(2), 0.3),
    (r"reading intel$", log(1.2), 0.2),
    (r"reading npu by operations", 0.1, 0.3),
    (r"cache npu by operations", log(2), 0.5),
    (r"reading hexagon v73", 0.3, 0.2),
    (r"cache cpu", -0.4, 0.7),
    (r"cache$", log(2), 0.5),
    (r"cache", 0.0, 0.3),
    (r"reading npu$", -0.35, 0.2),
    (r"reading npu \w+$", 0.0, 0.15),
    (r"reading cpu \w+$", 0.0, 0.15),
    (r"reading metal k", 0.1, 0.1),
    (r"reading (float|eight|four|k|low)$", 0.0, 0.05),
    (r"reading [\w:]+$", 0.0, 0.2),
    (r"bandwidth cpu", 0.0, 0.3),
    (r"bandwidth gpu", 0.0, 0.1),
    (r"bandwidth npu", 0.1, 0.1),
    (r"bandwidth metal k", 0.08, 0.2),
    (r"fixed npu$", log(4), 0.3),  # 4 ms for the launches of a graph on Hexagon
    (r"fixed npu:rknn", log(1.5), 0.5),  # what the chip's small cores do
    (r"fixed size", 0.25, 0.05),  # layers grow more slowly than weights
    (r"fixed cpu bandwidth", -0.5, 0.1),  # quicker processors come with quicker memory
    (r"fixed$", log(1.0), 0.7),
    (r"fixed .+$", 0.0, 0.5),
    (r"working cpu phone", log(1.5), 0.4),
    (r"working npu$", -1.0, 0.7),
    (r"working", 0.0, 0.7),
    (r"runtime executorch", -0.15, 0.15),  # its files hold an embedding that is looked up, not read
    (r"runtime llama.rn", 0.2, 0.1),  # an app, and a terminal, share the phone with all else that it does
    (r"runtime termux", 0.15, 0.15),
    (r"runtime qnn context", 0.15, 0.15),  # binaries of an older toolchain
    (r"runtime", 0.0, 0.15),
)
PREFILL_PRIORS: tuple[tuple[str, float, float], ...] = (
    (r"prompt cpu (float|k|low)$", log(2.5), 0.5),  # no kernels that repack
    (r"prompt opencl low", log(5), 0.5),
    (r"prompt \w+ (float|eight|four|k|low)$", 0.0, 0.3),
    (r"prompt gpu bandwidth", 0.0, 0.3),
    (r"prompt npu size", -0.4, 0.3),
    (r"prompt npu by operations", log(3), 0.5),
    (r"prompt hexagon v73", 0.4, 0.4),
    (r"prompt intel vulkan", log(4), 0.5),
    (r"prompt runtime", 0.0, 0.3),
    (r"prompt [\w:]+$", 0.0, 1.0),
    (r"prompt", 0.0, 0.4),
)


@dataclass(frozen=True)
class Sample:
    """A time to be met: its terms, its logarithm, and the chip that it is from."""

    terms: list[Term]
    log_time: float
    soc: str
    work: Workload


def samples(rows: Iterable[Row], part: Part) -> list[Sample]:
    """Return what the rows say about decoding or prefill."""
    terms: Callable[[Workload], list[Term]] = decode_terms if part == "decode" else prefill_terms
    speeds = ((row, row.decode if part == "decode" else row.prefill) for row in rows)
    return [
        Sample(terms(row.work), log_milliseconds(speed), row.soc, row.work)
        for row, speed in speeds
        if speed and (part == "decode" or row.work.kind != "cpu" or row.work.products_per_s)
    ]


def fit(found: Sequence[Sample], part: Part) -> dict[str, float]:
    """Return the coefficients that meet the samples best, by Gauss and Newton with the errors' weights renewed."""
    names = sorted({name for sample in found for term in sample.terms for name in term.weights} | _expected(part))
    prior, spread = np.transpose([_prior(name, part) for name in names])
    times, features = _matrices(found, names)
    wanted = np.array([sample.log_time for sample in found])
    counts = Counter(sample.soc for sample in found)
    weight = np.array([counts[sample.soc] ** -0.5 for sample in found])
    weight *= ROWS_OF_A_SOC * len(counts) / weight.sum() / NOISE**2
    theta = prior.copy()
    for _ in range(STEPS):
        parts = times * np.exp(np.einsum("rkn,n->rk", features, theta))
        total = parts.sum(1)
        slope = np.einsum("rk,rkn->rn", parts / total[:, None], features)
        error = wanted - np.log(total)
        robust = weight / np.sqrt(1 + (error / NOISE) ** 2)
        curve = (slope * robust[:, None]).T @ slope + np.diag(spread**-2)
        theta += np.linalg.solve(curve, slope.T @ (robust * error) + (prior - theta) / spread**2)
    return dict(zip(names, theta.tolist(), strict=True))


def _matrices(found: Sequence[Sample], names: Sequence[str]) -> tuple[Array, Array]:
    """Return milliseconds `[rows, terms]` and weights `[rows, terms, coefficients]`."""
    most, place = max(len(sample.terms) for sample in found), {name: at for at, name in enumerate(names)}
    times, features = np.zeros((len(found), most)), np.zeros((len(found), most, len(names)))
    for row, sample in enumerate(found):
        for at, term in enumerate(sample.terms):
            times[row, at] = term.milliseconds
            for name, weight in term.weights.items():
                features[row, at, place[name]] = weight
    return times, features


def _expected(part: Part) -> set[str]:
    """Return the coefficients that count something though no sample should call for them."""
    priors = DECODE_PRIORS if part == "decode" else PREFILL_PRIORS
    return {pattern for pattern, mean, _ in priors if mean and re.fullmatch(r"[a-z. ]+", pattern) and " " in pattern}


def _prior(name: str, part: Part) -> tuple[float, float]:
    priors = DECODE_PRIORS if part == "decode" else PREFILL_PRIORS
    return next((mean, spread) for pattern, mean, spread in priors if re.match(pattern, name))


@dataclass(frozen=True)
class HeldOut:
    """A sample, and what is predicted for it from the rows of other chips.

    Attributes:
        sample: The run.
        error: Logarithm of its time less that of the prediction, so that e to its power is predicted over real speed.
        fitted: What the prediction is from.
    """

    sample: Sample
    error: float
    fitted: Coefficients


def held_out(
    found: Sequence[Sample], part: Part, apart: Callable[[Sample], str] = lambda one: one.soc
) -> list[HeldOut]:
    """Return each sample as predicted from all that are not put with it, spreads of errors included."""
    sets = {apart(sample) for sample in found}
    values = {name: fit([sample for sample in found if apart(sample) != name], part) for name in sorted(sets)}
    bare = {name: _coefficients(part, one, {UNKNOWN: 0.0}, {UNKNOWN: 0.0}) for name, one in values.items()}
    tried = [
        HeldOut(one, one.log_time - bare[apart(one)].log_milliseconds(one.terms), bare[apart(one)]) for one in found
    ]
    full = {}
    for name, own in values.items():
        others = [one for one in tried if apart(one.sample) != name]
        full[name] = _with_errors(part, own, others)
    return [replace(one, fitted=full[apart(one.sample)]) for one in tried]


def fitted_to(found: Sequence[Sample], part: Part) -> Coefficients:
    """Return what ships: coefficients from all chips, and spreads from the errors of each left out."""
    return _with_errors(part, fit(found, part), held_out(found, part))


def _with_errors(part: Part, values: Mapping[str, float], tried: Sequence[HeldOut]) -> Coefficients:
    noise = _noise(tried, part)
    return _coefficients(part, values, _spreads(tried, part, noise), noise)


def _spreads(tried: Sequence[HeldOut], part: Part, noise: Mapping[str, float]) -> dict[str, float]:
    """Return the root of the mean square error by kind of processor, drawn to what is expected of an unknown one."""
    squares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in tried:
        work = one.sample.work
        for name in (work.kind, f"{work.kind} {work.machine}"):
            squares[name][one.sample.soc].append(one.error**2)
    means = {UNKNOWN: SPREADS_OF_UNKNOWN[part] ** 2}
    for name, by_soc in sorted(squares.items()):
        # A kind of processor is drawn to the unknown one, and one in a kind of machine to its kind.
        expected = means.get(name.split()[0], means[UNKNOWN])
        weights = [len(one) ** 0.5 for one in by_soc.values()]
        typical = [min(float(np.mean(one)), MOST_SPREAD[part] ** 2) for one in by_soc.values()]
        total = sum(weight * square for weight, square in zip(weights, typical, strict=True))
        means[name] = (total + UNKNOWN_SOCS * expected) / (sum(weights) + UNKNOWN_SOCS)
    beside = {
        name: FAMILY_SPREAD[part] ** 2 + PROGRAM_SPREAD[part] ** 2 + noise.get(name.split()[0], noise[UNKNOWN]) ** 2
        for name in means
    }
    return {name: max(mean - beside[name], LEAST_SPREAD**2) ** 0.5 for name, mean in means.items()}


def _noise(tried: Sequence[HeldOut], part: Part) -> dict[str, float]:
    """Return by how much the errors of runs with one device, program and family of formats differ, by processor."""
    groups: dict[str, dict[tuple[str, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in tried:
        work = one.sample.work
        groups[work.kind][one.sample.soc, work.backend, str(work.is_compiled), work.family, *program_of(work)].append(
            one.error
        )
    expected, noise = RUN_NOISE[part], {UNKNOWN: RUN_NOISE[part]}
    for kind, by_group in sorted(groups.items()):
        several = [errors for errors in by_group.values() if len(errors) > 1]
        # 80 % of two runs' differences are within as many deviations of a normal distribution; outliers count little.
        wide = [
            float(np.quantile([abs(a - b) for at, a in enumerate(errors) for b in errors[:at]], 0.8))
            for errors in several
        ]
        weights = [len(errors) ** 0.5 for errors in several]
        squares = sum(w * (one / EIGHTY_PERCENT) ** 2 / 2 for w, one in zip(weights, wide, strict=True))
        square = (squares + UNKNOWN_SOCS * expected**2) / (sum(weights) + UNKNOWN_SOCS)
        # What sizes differ by has a term of its own.
        noise[kind] = max(square - SIZE_SPREAD[part] ** 2, LEAST_NOISE**2) ** 0.5
    return noise


def _coefficients(
    part: Part, values: Mapping[str, float], spreads: Mapping[str, float], noise: Mapping[str, float]
) -> Coefficients:
    return Coefficients(
        values=values,
        spread=spreads,
        family_spread=FAMILY_SPREAD[part],
        program_spread=PROGRAM_SPREAD[part],
        size_spread=SIZE_SPREAD[part],
        noise=noise,
    )


def document() -> str:
    """Return the file of coefficients."""
    rows = published()
    lines = [
        "# Fitted to tests/benchmarks/published_bench.csv by: python -m tests.benchmarks.fitting",
        "# Logarithms; what each counts for is in exporter/predict/token_cost.py.",
    ]
    for part in PARTS:
        one = fitted_to(samples(rows, part), part)
        lines += ["", f"[{part}]"]
        lines += [f"{key} = {getattr(one, key):g}" for key in ("family_spread", "program_spread", "size_spread")]
        for key in ("values", "spread", "noise"):
            lines += ["", f"[{part}.{key}]"]
            lines += [f'"{name}" = {number:.4f}' for name, number in getattr(one, key).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    file = Path(exporter.predict.__file__).parent / FILE
    file.write_text(document(), encoding="utf-8")
    print(file)
