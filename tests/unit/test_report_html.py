"""The report's page: complete, self-contained, safe with hostile text, the same for the same documents."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from exporter.device.profile import load_device
from exporter.foundation.quantities import Check, from_json
from exporter.predict.prediction import predict
from exporter.predict.request import Request
from exporter.report import charts, figures
from exporter.report.data import Measurements, Report
from exporter.report.html import BASES, render_html

DATA = Path(__file__).parents[1] / "data"
HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'{{7*7}}"
VOID = {"meta", "br", "rect"}


@pytest.fixture
def report() -> Report:
    report = from_json(Report, (DATA / "report.json").read_bytes(), "report.json")
    request = Request(round(report.size.file_bytes.value), report.model.parameters, "Q4_K_M", "cpu", 2048)
    return report.model_copy(update={"expected": predict(load_device("iphone-15-pro"), request, None)})


@pytest.fixture
def measurements() -> Measurements:
    return from_json(Measurements, (DATA / "measurements.json").read_bytes(), "measurements.json")


class Page(HTMLParser):
    """What a browser would find in a page: tags, attributes, and whether every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag


def test_it_starts_as_html_and_every_tag_closes(report: Report, measurements: Measurements) -> None:
    page = render_html(report, measurements)
    assert page.startswith("<!doctype html>")
    assert {"main", "table", "svg", "details"} <= Page(page).tags


def test_it_is_the_same_for_the_same_documents(report: Report, measurements: Measurements) -> None:
    assert render_html(report, measurements) == render_html(report, measurements)


def test_it_loads_nothing_and_runs_nothing(report: Report, measurements: Measurements) -> None:
    page = render_html(report, measurements)
    found = Page(page)
    assert "://" not in page
    assert not re.search(r"url\(|@import|javascript:", page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not {name for name in found.attributes if name in {"src", "href"} or name.startswith("on")}
    assert "default-src 'none'" in page


def test_it_says_how_onnx_runtime_keeps_quiet(report: Report, measurements: Measurements) -> None:
    for target, told in {"gguf": False, "onnx": True, "onnx-qdq": True}.items():
        page = render_html(report.model_copy(update={"target": target}), measurements)
        assert ("<code>ORT_DISABLE_TELEMETRY=1</code>" in page) == told


def test_hostile_text_stays_text(report: Report, measurements: Measurements) -> None:
    model = report.model.model_copy(update={"name": HOSTILE, "origin": HOSTILE, "warnings": (HOSTILE,)})
    row = report.tensors[-1].model_copy(update={"role": HOSTILE, "format": HOSTILE, "name": HOSTILE, "reason": HOSTILE})
    bad = Check(name=HOSTILE, status="failed", detail=HOSTILE, value=1, limit=2, unit=HOSTILE)
    recipe = report.recipe.model_copy(update={"remarks": (HOSTILE,)})
    told = {"model": model, "recipe": recipe, "tensors": (*report.tensors, row), "checks": (bad,)}
    hostile = report.model_copy(update=told)
    page = render_html(hostile, measurements.model_copy(update={"versions": {HOSTILE: HOSTILE}}))
    found = Page(page)
    assert not found.tags & {"script", "img"}
    assert "onerror" not in found.attributes
    assert "{{7*7}}" in page
    assert html.unescape(page).count(HOSTILE) > 10


def test_warnings_and_remarks_stand_at_the_top(report: Report, measurements: Measurements) -> None:
    assert '<ul class="notice">' not in render_html(report, measurements)
    model = report.model.model_copy(update={"warnings": ("it was quantised before",)})
    recipe = report.recipe.model_copy(update={"remarks": ("speed has its price",)})
    page = render_html(report.model_copy(update={"model": model, "recipe": recipe}), measurements)
    notice = re.search(r'<ul class="notice">\n(.*?)</ul>\n<h2 class="over">On iPhone 15 Pro', page, re.DOTALL)
    assert notice is not None
    assert notice[1].split("\n")[:-1] == ["<li>it was quantised before</li>", "<li>speed has its price</li>"]


def test_every_check_and_basis_is_there(report: Report, measurements: Measurements) -> None:
    page = render_html(report, measurements)
    for check in report.checks + measurements.checks:
        assert html.escape(check.name) in page
        assert html.escape(check.detail).replace("&#x27;", "&#39;") in page
    for basis in BASES:
        assert f'<span class="basis basis-{basis}">{basis}</span>' in page


def test_each_card_says_its_own_basis(report: Report, measurements: Measurements) -> None:
    cards = re.findall(r'<div class="card">.*?</div>\n</div>', render_html(report, measurements), re.DOTALL)
    found = []
    for card in cards:
        title = re.search(r'class="title">([^<]*)<', card)
        basis = re.search(r"basis-(\w+)", card)
        assert title is not None
        assert basis is not None
        found.append((title[1], basis[1]))
    speeds = ["Writing", "Reading", "First token after", "Peak memory"]
    assert found[:4] == [(title, "estimated") for title in speeds]
    assert found[-4:] == list(zip(speeds, ["estimated", "measured", "emulated", "measured"], strict=True))
    assert ("Divergence (KL)", "measured") in found and ("Model files", "measured") in found


def test_what_is_expected_on_the_device_comes_first(report: Report, measurements: Measurements) -> None:
    page = render_html(report, measurements)
    assert report.expected is not None
    told = [report.expected.residence.sentence, "is expected to write", "same next token"]
    places = [page.index(html.escape(words)) for words in told]
    assert max(places) < page.index('<div class="cards">')
    made = report.expected.decode_tokens_per_s
    assert f"{figures.text(made.value, made.unit)} ({figures.interval(made.low, made.high, made.unit)})" in page
    assert page.index("On iPhone 15 Pro") < page.index("On the machine that built it")


def test_a_model_too_small_for_a_prediction_has_a_page_without(report: Report, measurements: Measurements) -> None:
    page = render_html(report.model_copy(update={"expected": None}), measurements)
    assert "is expected to write" not in page and "On the machine that built it" in page


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (["passed", "failed", "not run"], ("Failed", "1 of 3 checks failed")),
        (["passed", "not run"], ("Incomplete", "1 of 2 checks not run")),
        (["passed", "passed"], ("Passed", "all 2 checks")),
        (["passed"], ("Passed", "1 check")),
        ([], ("Incomplete", "no checks")),
    ],
)
def test_the_verdict_counts(
    report: Report, measurements: Measurements, states: list[str], words: tuple[str, str]
) -> None:
    checks = tuple(Check.model_validate({"name": state, "status": state, "detail": ""}) for state in states)
    page = render_html(report.model_copy(update={"checks": checks}), measurements.model_copy(update={"checks": ()}))
    assert f"<strong>{words[0]}</strong><span>{words[1]}</span>" in page


def test_failures_come_first(report: Report, measurements: Measurements) -> None:
    failed = Check(name="broken thing", status="failed", detail="")
    page = render_html(report.model_copy(update={"checks": (*report.checks, failed)}), measurements)
    assert page.index("broken thing") < page.index(report.checks[0].name + "<")


def test_every_matrix_is_listed_under_its_layer(report: Report, measurements: Measurements) -> None:
    page = render_html(report, measurements)
    titles = re.findall(r'<span class="name">([^<]*)</span>', page)
    assert titles == ["Outside the layers", "Layer 0", "Layer 1"]
    assert all(row.name in page for row in report.tensors)


def test_an_empty_report_is_still_a_page(report: Report, measurements: Measurements) -> None:
    nothing = report.size.file_bytes.model_copy(update={"value": 0.0})
    empty = report.model_copy(
        update={"tensors": (), "checks": (), "size": report.size.model_copy(update={"file_bytes": nothing})}
    )
    page = render_html(empty, measurements.model_copy(update={"stages": (), "checks": ()}))
    assert "No check was made." in page
    assert Page(page).tags >= {"main"}


def test_shares_add_up_to_the_files(report: Report) -> None:
    file_bytes = round(report.size.file_bytes.value)
    parts = charts.shares(report.tensors, file_bytes)
    assert sum(part.stored_bytes for part in parts) == file_bytes
    assert sum(part.fraction for part in parts) == pytest.approx(1)
    assert parts[0].title == "Embedding"
    assert parts[-1].title == "Everything else"
    assert parts[0].bits_per_weight == 8.5


def test_strips_tell_bits_apart(report: Report) -> None:
    strips = {strip.title: strip.svg for strip in charts.heat_strips(report.tensors)}
    assert set(strips) == {"Query", "Key", "Value", "Attention output", "Gate", "Up", "Down"}
    assert re.findall(r"step-(\d)", strips["Query"]) == ["3", "3"]
    assert re.findall(r"step-(\d)", strips["Value"]) == ["4", "4"]
    assert charts.steps_used(report.tensors) == [(3, "5 to 6"), (4, "6 to 9")]
