"""The report as one page for people: no script, nothing loaded, the same page for the same documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from exporter.foundation.quantities import Check, Quantity
from exporter.predict.estimate import Estimate
from exporter.predict.prediction import Prediction
from exporter.report import charts, figures
from exporter.report.data import Measurements, Report, TensorRow, verdict

TEMPLATE = "report.html.j2"
VERDICT_TITLES = {"passed": "Passed", "failed": "Failed", "incomplete": "Incomplete"}
STATUS_MARKS = {"passed": "✓", "failed": "✕", "not run": "–"}
STATUS_ORDER = ("failed", "not run", "passed")
BASES = {
    "measured": "on the machine that built it",
    "emulated": "under the device's limits or instruction set",
    "estimated": "computed by a model of the device",
    "published": "stated by others",
}


@dataclass(frozen=True)
class Figure:
    """A quantity as the page shows it, with a sentence that says what it means."""

    title: str
    number: str
    unit: str
    basis: str
    meaning: str

    @classmethod
    def expected(cls, title: str, estimate: Estimate, meaning: str) -> "Figure":
        """Return an estimate, with its interval before what it means."""
        number, unit = figures.amount(estimate.value, estimate.unit)
        between = figures.interval(estimate.low, estimate.high, estimate.unit)
        return cls(title, number, unit, estimate.basis, f"{between}; {meaning}")

    @classmethod
    def of(cls, title: str, quantity: Quantity, meaning: str) -> "Figure":
        """Return a quantity in the units people read."""
        number, unit = figures.amount(quantity.value, quantity.unit)
        return cls(title, number, unit, quantity.basis, meaning)


@dataclass(frozen=True)
class Section:
    """The matrices of one layer, or those outside the layers, with their sums."""

    title: str
    rows: tuple[TensorRow, ...]
    stored_bytes: int
    bits_per_weight: float
    formats: str
    worst_error: float | None
    predicted: bool


def render_html(report: Report, measurements: Measurements) -> str:
    """Return the page, one self-contained HTML document; all text of the documents is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        bytes=lambda size: figures.text(size, "bytes"),
        significant=figures.significant,
        percent=lambda fraction: figures.text(fraction, "fraction"),
        role=charts.role_title,
    )
    environment.globals.update(amount=figures.text, interval=figures.interval, pruned=figures.pruned)
    template = environment.from_string((files("exporter.report") / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(_view(report, measurements))


def _view(report: Report, measurements: Measurements) -> dict[str, object]:
    checks = report.checks + measurements.checks
    parts = charts.shares(report.tensors, round(report.size.file_bytes.value))
    return {
        "report": report,
        "measurements": measurements,
        "verdict": verdict(checks),
        "verdict_title": VERDICT_TITLES[verdict(checks)],
        "verdict_count": _count(checks),
        "checks": sorted(checks, key=lambda check: STATUS_ORDER.index(check.status)),
        "marks": STATUS_MARKS,
        "bases": BASES,
        "smaller": _times_smaller(report),
        "expected": [] if report.expected is None else _expected(report.expected),
        "cards": _cards(report),
        "host": _host(measurements),
        "accuracy": _accuracy(report),
        "shares": parts,
        "bar": charts.stacked_bar(parts),
        "strips": charts.heat_strips(report.tensors),
        "steps": charts.steps_used(report.tensors),
        "sections": _sections(report.tensors),
        "slowest": max((stage.seconds for stage in measurements.stages), default=0.0),
    }


def _count(checks: Sequence[Check]) -> str:
    """Return what the verdict counts: failures if any, else checks not run, else all."""
    if not checks:
        return "no checks"
    for status in STATUS_ORDER[:-1]:
        number = sum(check.status == status for check in checks)
        if number:
            return f"{number} of {len(checks)} checks {status}"
    return f"all {len(checks)} checks" if len(checks) > 1 else "1 check"


def _times_smaller(report: Report) -> str:
    """Return how often the model files fit into the weights at 16 bits."""
    size = report.size.file_bytes.value
    return figures.significant(2 * report.model.parameters / size) if size else "–"


def _expected(made: Prediction) -> list[Figure]:
    """Return the cards on the device: how fast it answers, and what it takes."""
    cards = [
        Figure.expected("Writing", made.decode_tokens_per_s, "one token at a time"),
        Figure.expected("Reading", made.prefill_tokens_per_s, "the prompt at once"),
        Figure.expected("First token after", made.time_to_first_token_ms, f"for a prompt of {made.prompt:,} tokens"),
        Figure.expected("Peak memory", made.peak_bytes, f"with a context of {made.context:,} tokens"),
        Figure.expected("First load", made.load_ms, "of the model files from storage"),
    ]
    if made.sustained_decode_tokens_per_s is not None:
        cards.append(Figure.expected("Writing, sustained", made.sustained_decode_tokens_per_s, "after minutes of load"))
    if made.energy_per_token_joules is not None:
        cards.append(Figure.expected("Energy", made.energy_per_token_joules, "of the whole device"))
    return cards


def _host(measurements: Measurements) -> list[Figure]:
    """Return the cards on the machine that built the bundle."""
    speed, memory = measurements.speed, measurements.memory
    before = figures.text(memory.interpreter_bytes.value, memory.interpreter_bytes.unit)
    return [
        Figure.of("Writing", speed.decode_tokens_per_s, "decode, one token at a time"),
        Figure.of("Reading", speed.prefill_tokens_per_s, "prefill, the prompt at once"),
        Figure.of("First token after", speed.time_to_first_token_ms, "from prompt to first answer"),
        Figure.of("Peak memory", memory.peak_bytes, f"of the process; {before} of it before the model"),
    ]


def _cards(report: Report) -> list[Figure]:
    """Return the cards on the model: its size, and what it lost."""
    size, accuracy = report.size, report.accuracy
    coded = []
    if size.coded_bytes is not None and size.coded_bits_per_weight is not None:
        bits = figures.text(size.coded_bits_per_weight.value, size.coded_bits_per_weight.unit)
        coded = [Figure.of("Shipped coded", size.coded_bytes, f"{bits} a weight; unpacked on the device")]
    return [
        *coded,
        Figure.of("Model files", size.file_bytes, f"{_times_smaller(report)} times smaller than at 16 bits"),
        Figure.of("Bits per weight", size.bits_per_weight, "of the original; scales and padding included"),
        Figure.of("Same next token", accuracy.top1_agreement, "as the original model's first choice"),
        Figure.of("Divergence (KL)", accuracy.kl_mean, "a token, on average; 0 is identical"),
    ]


def _accuracy(report: Report) -> list[Figure]:
    found = report.accuracy
    figures = [
        Figure.of(
            "Mean KL divergence",
            found.kl_mean,
            "How far the next-token probabilities are from the original's, averaged over all tokens.",
        ),
        Figure.of(
            "KL divergence, 99th percentile",
            found.kl_p99,
            "One token in a hundred is further from the original than this.",
        ),
        Figure.of(
            "Top-1 agreement",
            found.top1_agreement,
            "How often both models hold the same next token to be the likeliest.",
        ),
        Figure.of(
            "Agreement where the original is sure",
            found.confident_agreement,
            "The same, where the original's first choice is ahead by more than 0.5 nats (a factor of 1.6).",
        ),
        Figure.of(
            "Perplexity ratio",
            found.perplexity_ratio,
            "How much more the text surprises this model than the original; 1 means no loss.",
        ),
        Figure.of(
            "Predicted divergence",
            found.predicted_kl,
            "The mean divergence that the formats were predicted to cost before anything was encoded.",
        ),
        Figure.of(
            "Runtime rounding",
            found.runtime_rounding_kl,
            "The part of the divergence that comes from the rounding of activations, not from the weights.",
        ),
    ]
    if found.default_kl_mean is not None:
        figures.append(
            Figure.of(
                "Divergence by default",
                found.default_kl_mean,
                "The mean divergence on a CPU whose runtime rounds activations more than the files state, as it does "
                "by default. Every other number here is of the files' own arithmetic.",
            )
        )
    return figures


def _sections(rows: Sequence[TensorRow]) -> list[Section]:
    layers = dict.fromkeys(row.layer for row in rows)
    ordered = sorted(layers, key=lambda layer: -1 if layer is None else layer)
    return [_section(layer, [row for row in rows if row.layer == layer]) for layer in ordered]


def _section(layer: int | None, rows: Sequence[TensorRow]) -> Section:
    errors = [row.output_error for row in rows if row.output_error is not None]
    return Section(
        title="Outside the layers" if layer is None else f"Layer {layer}",
        rows=tuple(rows),
        stored_bytes=sum(row.stored_bytes for row in rows),
        bits_per_weight=charts.mean_bits(rows),
        formats=", ".join(sorted({row.format for row in rows})),
        worst_error=max(errors, default=None),
        predicted=all(row.evaluation_kl is not None and row.calibration_kl is not None for row in rows),
    )
