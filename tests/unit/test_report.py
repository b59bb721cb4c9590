"""Report data: one spelling, strict reading, the merged form, and verdicts."""

import json
from pathlib import Path

import pytest

from exporter.foundation.errors import InputError
from exporter.foundation.quantities import Check, from_json
from exporter.report import figures
from exporter.report.data import Measurements, Report, merged, to_json, verdict

DATA = Path(__file__).parents[1] / "data"
REPORT = (DATA / "report.json").read_text(encoding="utf-8")
MEASUREMENTS = (DATA / "measurements.json").read_text(encoding="utf-8")


@pytest.fixture
def report() -> Report:
    return from_json(Report, REPORT, "report.json")


@pytest.fixture
def measurements() -> Measurements:
    return from_json(Measurements, MEASUREMENTS, "measurements.json")


def check(status: str) -> Check:
    return Check.model_validate({"name": "a", "status": status, "detail": ""})


def test_a_document_has_one_spelling(report: Report, measurements: Measurements) -> None:
    assert to_json(report) == REPORT
    assert to_json(measurements) == MEASUREMENTS


def test_json_sorts_keys_and_ends_with_a_newline(report: Report) -> None:
    text = to_json(report)
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text.startswith('{\n "accuracy"')


def test_floats_survive_exactly(report: Report) -> None:
    third = report.size.bits_per_weight.model_copy(update={"value": 1 / 3})
    changed = report.model_copy(update={"size": report.size.model_copy(update={"bits_per_weight": third})})
    assert from_json(Report, to_json(changed), "").size.bits_per_weight.value == 1 / 3


@pytest.mark.parametrize(
    "path",
    [
        "accuracy.kl_mean",
        "accuracy.kl_p99",
        "accuracy.top1_agreement",
        "accuracy.confident_agreement",
        "accuracy.perplexity_ratio",
        "accuracy.runtime_rounding_kl",
        "size.file_bytes",
        "size.bits_per_weight",
        "speed.prefill_tokens_per_s",
        "speed.decode_tokens_per_s",
        "speed.time_to_first_token_ms",
        "memory.peak_bytes",
    ],
)
def test_merged_holds_each_figure_with_its_basis(report: Report, measurements: Measurements, path: str) -> None:
    part, name = path.split(".")
    both = json.loads(json.dumps(merged(report, measurements)))
    assert set(both[part][name]) == {"value", "unit", "basis"}


def test_merged_holds_the_checks_of_both_and_every_tensor(report: Report, measurements: Measurements) -> None:
    both = json.loads(json.dumps(merged(report, measurements)))
    names = [check.name for check in report.checks + measurements.checks]
    assert [check["name"] for check in both["checks"]] == names
    assert len(both["tensors"]) == len(report.tensors) == 15
    assert both["verdict"] == "passed"
    assert {"model", "device", "target", "recipe", "host", "versions"} <= set(both)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["passed", "passed"], "passed"),
        (["passed", "not run"], "incomplete"),
        (["not run", "failed", "passed"], "failed"),
        ([], "incomplete"),
    ],
)
def test_a_check_that_was_not_run_is_never_a_pass(states: list[str], expected: str) -> None:
    assert verdict(tuple(check(state) for state in states)) == expected


def test_report_passed_needs_every_check(report: Report) -> None:
    assert report.passed
    assert not report.model_copy(update={"checks": (*report.checks, check("not run"))}).passed


def test_an_unknown_key_is_refused() -> None:
    text = REPORT.replace('"context"', '"contxt"')
    with pytest.raises(InputError, match=r"b/report.json: not a Report document: recipe\.con.*get the bundle again"):
        from_json(Report, text, "b/report.json")


def test_another_schema_version_is_refused() -> None:
    text = REPORT.replace('"schema_version": 2', '"schema_version": 3')
    with pytest.raises(
        InputError, match=r"schema_version: Input should be 1 or 2; .*version of edge-exporter that made it"
    ):
        from_json(Report, text, "report.json")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "NaN", b"\xff\xfe"])
def test_damaged_text_is_refused(text: str | bytes) -> None:
    with pytest.raises(InputError, match="not a Report document"):
        from_json(Report, text, "report.json")


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (105_665_408, "bytes", "106 MB"),
        (999, "bytes", "999 bytes"),
        (999_900, "bytes", "1.00 MB"),
        (3.12e9, "bytes", "3.12 GB"),
        (2e15, "bytes", "2,000 TB"),
        (0.921, "fraction", "92.1 %"),
        (1.0617, "ratio", "1.062 ×"),
        (0.049, "nats", "0.0490 nats"),
        (3.2e-7, "nats", "3.2e-07 nats"),
        (0, "nats", "0 nats"),
        (1527.4, "tokens/s", "1,527 tokens/s"),
        (48.1, "", "48.1"),
    ],
)
def test_figures_read_well(value: float, unit: str, expected: str) -> None:
    assert figures.text(value, unit) == expected
