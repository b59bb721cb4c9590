"""Every named recipe with its defaults, in both targets, and some at other sizes: what is shipped, and its KL.

    .venv/bin/python -m pytest tests/benchmarks/test_recipes.py --timeout=0 -s

builds bundles of the reference model at effort `balanced` and takes the figures from their reports, which are measured
in the real runtimes: on the model and the text that nothing was tuned on, as in test_quality.py, whose rows are drawn
beside them. Each row is kept in recipes.json when it is there, so that an interrupted run goes on.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.calibrate.text import file_windows
from exporter.job import Job
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.pipeline import build
from exporter.recipe import recipe_names
from exporter.report.data import Report
from tests.benchmarks.bench import EVALUATION_WINDOWS, PUBLISHED, instructions, source_code
from tests.benchmarks.measured import THREADS, WINDOW, Published, Row
from tests.benchmarks.picture import Axis, picture
from tests.benchmarks.test_quality import UNTUNED
from tests.reference import plain_texts, reference_model

ROWS = Published(Path(__file__).with_name("recipes.json"))
PICTURE = Path(__file__).with_name("recipes.svg")
# Of each target the type of 8 bits: a model of them is what is least changed.
EIGHT_BITS = {"gguf": "Q8_0", "onnx": "int8"}
DEVICE = "core-ultra-200v"
# KL of pruning in closed form over PruneNet's, at most.
CLOSED_LIMIT = 0.6
# What the runtime's rounding adds, over what it adds to 8-bit weights, at most; for models that lose less than this.
# Others are themselves more sensitive: 2-bit weights alone, at 2.8 nats, show five times what 8-bit weights do.
ROUNDING_LIMIT, SOUND_KL = 1.2, 0.2


@dataclass(frozen=True)
class Point:
    """A recipe at another size than its own: name, target, and the options of its only step but transport."""

    name: str
    target: str
    step: str
    options: tuple[tuple[str, float], ...]
    coded: bool = False

    def written(self, folder: Path) -> Path:
        """Write the recipe into a folder."""
        lines = ["schema_version = 1", f'title = "{self.name}"', "", "[[step]]", f'method = "{self.step}"']
        lines += [f"{key} = {value}" for key, value in self.options]
        if self.coded:
            lines += ["", "[[step]]", 'method = "transport"', 'profile = "small"']
        path = folder / f"{self.name.replace(' ', '-').replace('%', 'percent').replace(',', '')}.toml"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        return path


POINTS = (
    *(Point(f"rate {bits:g}", "gguf", "rate", (("bits", bits),), coded=True) for bits in (2.0, 2.5, 3.5, 4.5)),
    *(Point(f"double {bits:g}", "gguf", "double", (("bits", bits),), coded=True) for bits in (3.0, 4.5)),
    *(Point(f"caldera, rank {rank}", "onnx", "caldera", (("rank", rank),)) for rank in (32, 128)),
    Point("prune-closed-form 10 %", "onnx", "prune-closed-form", (("ratio", 0.1),)),
)


@dataclass(frozen=True)
class World:
    """The model, the texts, and what figures depend on."""

    folder: Path
    calibration: Path
    evaluation: Path
    identity: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = reference_model(tmp_path_factory.mktemp("reference") / "model", UNTUNED.seed)
    texts = tmp_path_factory.mktemp("texts")
    calibration, _ = plain_texts(texts)
    evaluation = source_code(texts)
    with open_model(str(folder)) as model:
        windows = file_windows(evaluation, load_tokenizer(model.folder), EVALUATION_WINDOWS, WINDOW)
        identity = {"model": model.digest, "evaluation": windows.digest, "machine": instructions()}
    return World(folder, calibration, evaluation, identity)


def row(name: str, kind: str, report: Report) -> Row:
    size, accuracy = report.size, report.accuracy
    shipped = size.coded_bytes or size.file_bytes
    return Row(
        name,
        kind,
        report.target,
        int(shipped.value),
        accuracy.kl_mean.value,
        accuracy.top1_agreement.value,
        accuracy.predicted_kl.value,
        accuracy.runtime_rounding_kl.value,
    )


def built(world: World, name: str, target: str, scratch: Path, recipe: str | None = None) -> Row:
    """Return the row of a recipe, or of a type of that name, from the file if it is there."""
    conditions = f"{name}, {target}"
    if known := ROWS.rows(conditions, world.identity):
        return known[0]
    output = scratch / "bundle"
    job = Job(
        str(world.folder), DEVICE, target, None if recipe else name, output=output, recipe=recipe, threads=THREADS,
        calibration=world.calibration, evaluation=world.evaluation, evaluation_windows=EVALUATION_WINDOWS,
    )  # fmt: skip
    found = row(name, "recipe" if recipe else "ours", build(job).report)
    shutil.rmtree(output)
    ROWS.keep(conditions, world.identity, [found])
    return found


def test_recipes_where_they_stand(world: World, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str | None]] = [(type, target, None) for target, type in EIGHT_BITS.items()]
    asked += [(name, target, name) for name in recipe_names() for target in EIGHT_BITS]
    asked += [(one.name, one.target, str(one.written(tmp_path))) for one in POINTS]
    rows = []
    print(f"\n{UNTUNED.name}: {EVALUATION_WINDOWS} windows of {WINDOW} tokens")
    for name, target, recipe in asked:
        found = built(world, name, target, tmp_path, recipe)
        rows.append(found)
        print(
            f"  {target:4} {found.file_bytes:11,} bytes  KL {found.kl_mean:.4f}, of it by the runtime's rounding "
            f"{found.rounding:.4f}  {found.top1:.1%}  {name}",
            flush=True,
        )
    with open_model(str(world.folder)) as model:
        PICTURE.write_text(picture([*rows, *stock_and_ours()], Axis.bits(model.architecture.parameters)), "utf-8")
    rounding = {one.target: one.rounding or 0.0 for one in rows if one.name in EIGHT_BITS.values()}
    kl = {(one.name, one.target): one.kl_mean for one in rows}
    for one in rows:
        if one.kl_mean < SOUND_KL:
            assert one.rounding is not None and one.rounding <= ROUNDING_LIMIT * rounding[one.target], one
    for target in EIGHT_BITS:
        assert kl["prune-closed-form", target] <= CLOSED_LIMIT * kl["prunenet", target]
        assert kl["rate", target] < kl["caldera", target]


def stock_and_ours() -> list[Row]:
    """Return the rows of test_quality.py on the same model and text, without those that restrict the embedding."""
    rows = [one for one in PUBLISHED.latest(UNTUNED.name) if one.kind in ("ours", "stock")]
    if not rows:
        pytest.fail("run tests/benchmarks/test_quality.py first: the picture needs its rows")
    return [one for one in rows if "embedding" not in one.name and "budget" not in one.name]
