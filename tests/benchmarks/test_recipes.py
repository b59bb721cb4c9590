"""Every named recipe with its defaults, in both targets: what is shipped, and the KL that it costs.

    .venv/bin/python -m pytest tests/benchmarks/test_recipes.py --timeout=0 -s

builds bundles of the reference model at effort `balanced` and takes the figures from their reports, which are measured
in the real runtimes on prose that was not calibrated on: the same tokens as in test_quality.py, whose rows are drawn
beside them. Each row is kept in recipes.json when it is there, so that an interrupted run goes on.
"""

import platform
from dataclasses import asdict
from pathlib import Path

import pytest

from exporter.errors import RequestError
from exporter.job import Job
from exporter.pipeline import build
from exporter.recipe import load_recipe, recipe_names
from exporter.report.data import Report
from tests.benchmarks.bench import EVALUATION_WINDOWS, PUBLISHED
from tests.benchmarks.measured import WINDOW, Published, Row
from tests.benchmarks.picture import picture
from tests.benchmarks.test_quality import TUNED
from tests.reference import plain_texts, reference_model

ROWS = Published(Path(__file__).with_name("recipes.json"))
PICTURE = Path(__file__).with_name("recipes.svg")
TARGETS = ("gguf", "onnx")
DEVICE = "core-ultra-200v"
# KL of pruning in closed form over PruneNet's, at most.
CLOSED_LIMIT = 0.6


def row(name: str, report: Report) -> Row:
    size, accuracy = report.size, report.accuracy
    shipped = size.coded_bytes or size.file_bytes
    return Row(
        name,
        "recipe",
        report.target,
        int(shipped.value),
        accuracy.kl_mean.value,
        accuracy.top1_agreement.value,
        accuracy.predicted_kl.value,
    )


def test_named_recipes_where_they_stand(tmp_path: Path) -> None:
    folder = reference_model(tmp_path / "model")
    calibration, evaluation = plain_texts(tmp_path)
    rows: list[Row] = []
    plain: dict[str, float] = {}
    print(f"\n{EVALUATION_WINDOWS} windows of {WINDOW} tokens of prose")
    for target in TARGETS:
        for name in recipe_names():
            job = Job(
                str(folder), DEVICE, target, output=tmp_path / f"{name}-{target}", recipe=name,
                calibration=calibration, evaluation=evaluation, evaluation_windows=EVALUATION_WINDOWS,
            )  # fmt: skip
            identity = {"machine": platform.machine(), "recipe": asdict(load_recipe(name))["title"]}
            conditions = f"{name}, {target}"
            if not (known := ROWS.rows(conditions, identity)):
                try:
                    known = [row(name, build(job).report)]
                except RequestError as error:
                    print(f"  {conditions}: {error}")
                    continue
                ROWS.keep(conditions, identity, known)
            rows += known
            found = known[0]
            plain[conditions] = found.kl_mean
            print(
                f"  {target:4} {found.file_bytes:11,} bytes  KL {found.kl_mean:.4f} (predicted {found.predicted:.4f})  "
                f"{found.top1:.1%}  {name}",
                flush=True,
            )
    PICTURE.write_text(picture([*rows, *stock_and_ours()]), "utf-8")
    for target in TARGETS:
        assert plain[f"prune-closed-form, {target}"] <= CLOSED_LIMIT * plain[f"prunenet, {target}"]
        assert plain[f"rate, {target}"] < plain[f"caldera, {target}"]


def stock_and_ours() -> list[Row]:
    """Return the rows of test_quality.py on the same model and text, without those that restrict the embedding."""
    rows = [one for one in PUBLISHED.latest(TUNED.name) if one.kind in ("ours", "stock")]
    if not rows:
        pytest.fail("run tests/benchmarks/test_quality.py first: the picture needs its rows")
    return [one for one in rows if "embedding" not in one.name and "budget" not in one.name]
