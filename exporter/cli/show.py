"""What the commands print: rich tables for people, one JSON document for machines."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from exporter.bundle.manifest import MEASUREMENTS, REPORT, REPORT_PAGE
from exporter.bundle.reading import read_document, read_manifest
from exporter.foundation.errors import InputError, printable
from exporter.foundation.quantities import Check, Pruning, Quantity
from exporter.predict.prediction import Prediction
from exporter.report.data import Measurements, Report, merged
from exporter.report.figures import ESTIMATES, interval, pruned
from exporter.report.figures import text as figure

if TYPE_CHECKING:  # they bring torch along, which most commands do without
    from exporter.bundle.installed import Answer
    from exporter.planning.outline import Outline

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
STATUS = {"passed": "[green]passed[/]", "failed": "[red]failed[/]", "not run": "[yellow]not run[/]"}
# Between two lines of one stage where progress goes into a log.
LOG_SECONDS = 20
FIGURES = (
    ("size.file_bytes", "model files"),
    ("size.bits_per_weight", "bits a weight of the original, all counted"),
    ("size.coded_bytes", "shipped coded"),
    ("size.coded_bits_per_weight", "bits a weight as shipped"),
    ("accuracy.kl_mean", "KL(original || artifact), mean"),
    ("accuracy.kl_p99", "KL, 99th percentile"),
    ("accuracy.top1_agreement", "same next token"),
    ("accuracy.confident_agreement", "the same where the original is sure"),
    ("accuracy.perplexity_ratio", "perplexity ratio"),
    ("accuracy.predicted_kl", "of it the formats, as predicted"),
    ("accuracy.runtime_rounding_kl", "of it the rounding of activations"),
    ("accuracy.default_kl_mean", "KL with the CPU runtime's default rounding"),
)
# What the machine that built it measured.
HOST_FIGURES = (
    ("speed.prefill_tokens_per_s", "prefill"),
    ("speed.decode_tokens_per_s", "decode"),
    ("speed.time_to_first_token_ms", "time to first token"),
    ("memory.peak_bytes", "peak memory"),
    ("emulation.peak_bytes", "peak memory, under the device's limits"),
)

OUTLINED = (
    "file_bytes", "adapter_bytes", "runtime_peak_bytes", "build_peak_bytes", "disk_bytes", "cache_bytes",
    "build_seconds",
)  # fmt: skip


@contextmanager
def progress(enabled: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Show stages with their steps and the time left, on the error stream: bars on a terminal, lines in a log."""
    if enabled and not sys.stderr.isatty():
        yield _logged()
        return
    columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bars = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled
    )
    tasks: dict[str, Any] = {}

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(plain(stage), total=total)
        bars.update(tasks[stage], completed=done)

    with bars:
        yield advance


def _logged(now: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """Return what prints a line when a stage is over, and within a long one every `LOG_SECONDS`."""
    began: dict[str, float] = {}
    told: dict[str, float] = {}

    def advance(stage: str, done: int, total: int) -> None:
        at = now()
        taken = at - began.setdefault(stage, at)
        over = done >= total
        if told.get(stage) == math.inf or not (over or at - told.setdefault(stage, at) >= LOG_SECONDS):
            return
        told[stage] = math.inf if over else at
        left = f", about {taken / done * (total - done):.0f} s left" if done and not over else ""
        line(f"{printable(stage):<22} {done}/{total}, {taken:.0f} s{left}", sys.stderr)

    return advance


def plain(value: object) -> str:
    """Return text that came from outside as rich may print it: without markup, and printable."""
    return escape(printable(value))


def line(text: object, file: TextIO | None = None) -> None:
    """Print text as it is, its lines kept, without colours."""
    print(printable(text, kept="\n\t"), file=file, flush=True)


def document(facts: object, as_json: bool, show: Callable[[], None]) -> None:
    """Print facts as JSON, or call what prints them for people."""
    if as_json:
        # What JSON lets pass raw is escaped as well, and then is the same JSON.
        line(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        show()


def answer_facts(prompt: str, answer: "Answer") -> dict[str, object]:
    """Return what a bundle answered, and what it took where its weights are coded."""
    facts: dict[str, object] = {"prompt": prompt, "answer": answer.text}
    if answer.residence is None:
        return facts
    return facts | {"residence": asdict(answer.residence) | {"basis": "measured"}}


def answer(answer: "Answer") -> None:
    """Print what a bundle answered; what coded weights take goes to the error stream."""
    line(answer.text)
    took = answer.residence
    if took is not None:
        size = f"{figure(took.resident_bytes, 'bytes')} for {figure(took.weight_bytes, 'bytes')} of weights"
        speed = "" if took.tokens_per_s is None else f", {took.tokens_per_s:.3g} tokens/s"
        parts = f"{took.coded_parts} parts coded, {took.plain_parts} plain"
        line(f"in memory: {size}, {parts}{speed} (measured)", sys.stderr)


def bundle_facts(bundle: Path) -> dict[str, object]:
    """Return report, measurements and manifest of a bundle as one JSON-able object."""
    manifest = read_manifest(bundle)
    report = read_document(bundle, REPORT, Report)
    measurements = read_document(bundle, MEASUREMENTS, Measurements)
    return {
        **merged(report, measurements),
        "path": bundle.name,
        "content_digest": manifest.content_digest,
        "evidence_digest": manifest.evidence_digest,
    }


def bundle(path: Path) -> None:
    """Print a bundle's figures and checks."""
    facts: dict[str, Any] = bundle_facts(path)
    recipe = (
        f"{facts['target']}, {facts['recipe']['scheme']} by {facts['recipe']['method']} ({facts['recipe']['effort']})"
    )
    console.print(f"[bold]{plain(facts['model']['name'])}[/] for {plain(facts['device_title'])}: {plain(recipe)}")
    if facts["expected"] is not None:
        _expected(Prediction.model_validate_json(json.dumps(facts["expected"])), facts["device_title"])
    _figures(facts, FIGURES)
    console.print(f"on the machine that built it, {plain(facts['host']['cpu'])}:")
    _figures(facts, HOST_FIGURES)
    removed = facts["pruning"]
    _pruning(None if removed is None else Pruning.model_validate(removed, strict=False))
    _notes((*facts["model"]["warnings"], *facts["recipe"]["remarks"]))
    checks(Check.model_validate(check) for check in facts["checks"])
    digests = (
        f"content {facts['content_digest'][:16]}, evidence {(facts['evidence_digest'] or 'without a digest')[:16]}"
    )
    console.print(f"bundle [bold]{plain(path)}[/], {plain(digests)}, report {plain(path / REPORT_PAGE)}")


def _expected(made: "Prediction", device: str) -> None:
    """Print what is expected on the device: the first lines of all that is said of a bundle."""
    console.print(
        f"expected on {plain(device)}, {plain(made.backend)}, with a context of {made.context:,} tokens "
        f"(a prompt of {made.prompt:,} before the first token):"
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, title in ESTIMATES.items():
        one = getattr(made, key)
        if one is not None:
            between = interval(one.low, one.high, one.unit)
            table.add_row(title, figure(one.value, one.unit), between, f"[dim]{one.basis}[/]")
    console.print(table)
    console.print(plain(made.residence.sentence))


def _figures(facts: dict[str, Any], figures: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, title in figures:
        quantity = _at(facts, key)
        if quantity is not None:
            table.add_row(title, _figure(quantity), f"[dim]{plain(quantity['basis'])}[/]")
    console.print(table)


def _figure(quantity: dict[str, Any]) -> str:
    return plain(figure(quantity["value"], quantity["unit"]))


def _notes(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(f"[yellow]note:[/] {plain(sentence)}")


def _pruning(pruning: Pruning | None) -> None:
    if pruning is not None:
        console.print(f"{plain(pruning.method)} removed {plain(pruned(pruning))}")


def _at(facts: dict[str, Any], key: str) -> dict[str, Any] | None:
    section, name = key.split(".")
    found: dict[str, Any] | None = (facts[section] or {}).get(name)
    return found


def checks(found: Iterable[Check]) -> None:
    """Print checks, one a line."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for check in found:
        table.add_row(STATUS[check.status], plain(check.name), f"[dim]{plain(check.detail)}[/]")
    console.print(table)


def checks_facts(found: tuple[Check, ...]) -> dict[str, object]:
    """Return checks as one JSON-able object."""
    return {"checks": [check.model_dump(mode="json") for check in found]}


def outline_facts(made: "Outline") -> dict[str, object]:
    """Return an outline as one JSON-able object."""
    return made.model_dump(mode="json")


def outline(made: "Outline") -> None:
    """Print an outline."""
    console.print(
        f"[bold]{plain(made.model)}[/] for {plain(made.device_title)}: {plain(made.target)}, "
        f"{plain(made.scheme)} by {plain(made.method)}"
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in OUTLINED:
        quantity: Quantity | None = getattr(made, name)
        if quantity is None:
            continue
        table.add_row(name.replace("_", " "), figure(quantity.value, quantity.unit), "[dim]estimated[/]")
    for stage, quantity in made.stage_seconds.items():
        table.add_row(f"[dim]  {stage}[/]", f"[dim]{figure(quantity.value, 's')}[/]", "")
    console.print(table)
    _pruning(made.pruning)
    console.print("[dim]calibration text, statistics and the original's own answers stay in the cache[/]")
    counts = Counter((decision.format, decision.reason) for decision in made.decisions)
    for (format, reason), count in counts.items():
        console.print(f"{count:4d} x {plain(format):<8} [dim]{plain(reason)}[/]")
    _notes(made.warnings)
    checks(made.checks)


def quantities(facts: dict[str, Any]) -> None:
    """Print named quantities."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, quantity in facts.items():
        table.add_row(plain(name), _figure(quantity), f"[dim]{plain(quantity['basis'])}[/]")
    console.print(table)


def comparison(facts: list[dict[str, Any]]) -> None:
    """Print bundles in columns; a difference of the evaluation text is said, since KLs then do not compare."""
    titles = (f"{plain(one['path'])}\n{plain(one['target'] + ' ' + one['recipe']['scheme'])}" for one in facts)
    table = Table("", *titles, box=None)
    expected = ((f"expected.{key}", f"{title}, expected on its device") for key, title in ESTIMATES.items())
    host = ((key, f"{title}, on its build machine") for key, title in HOST_FIGURES)
    for key, title in (*expected, *FIGURES, *host):
        found = [_at(one, key) for one in facts]
        if any(found):
            table.add_row(title, *(_figure(one) if one else "" for one in found))
    console.print(table)
    if len({one["accuracy"]["text_digest"] for one in facts}) > 1:
        console.print("[yellow]note:[/] accuracy was measured on different texts and does not compare")


def gguf_facts(path: Path) -> dict[str, object]:
    """Return the tensors of a GGUF file."""
    from exporter.model.gguf_reader import open_gguf

    if not path.is_file():
        raise InputError("there is no such file", where=path)
    tensors = [
        {
            "name": t.name,
            "format": t.tensor_type.name,
            "shape": [int(n) for n in t.shape[::-1]],
            "bytes": int(t.n_bytes),
        }
        for t in open_gguf(path).tensors
    ]
    return {"path": path.name, "tensors": tensors}


def tensors(facts: dict[str, Any]) -> None:
    """Print tensors, one a line."""
    table = Table("tensor", "format", "shape", "bytes", box=None)
    for tensor in facts["tensors"]:
        shape = "x".join(map(str, tensor["shape"]))
        table.add_row(plain(tensor["name"]), plain(tensor["format"]), shape, str(tensor["bytes"]))
    console.print(table)
