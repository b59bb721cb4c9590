"""What a budget is worth on models of many families, beside round to nearest of equal bytes.

    taskset -c 0 .venv/bin/python -m pytest tests/benchmarks/test_families.py --timeout=0 -s

Each model is trained from a seed on prose, for less than a minute on one thread, and measured on the end of that prose,
which nothing was trained, calibrated or chosen on. Rows are kept in families.json, as soon as they are measured.
"""

import time
from pathlib import Path
from statistics import median

import pytest

from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress.compression import Compression
from exporter.compress.effort import effort
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Reference
from exporter.targets.contract import load_target, lower
from exporter.targets.facts import facts_of
from tests.benchmarks.measured import identity, measured, removed
from tests.benchmarks.ours import Exporter
from tests.benchmarks.rows import Row
from tests.benchmarks.tables import FAMILIES, SEEDS, TRAINED, family_pairs, seeded
from tests.reference import plain_texts, unseen_text
from tests.widths import perplexity, trained

STEPS, WINDOW, EVALUATION_WINDOWS = 60, 256, 16
NEAREST = {"gguf": "Q4_0", "onnx": "int4"}
# A budget at effort `balanced` may lose this share of what round to nearest loses, in the median of the seeds.
MOST_RATIO = 0.7


@pytest.mark.parametrize("family", sorted({one for families in TRAINED.values() for one in families}))
@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, family: str) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    prose, unseen = plain_texts(tmp_path)[0], unseen_text(tmp_path)
    folder, before = tmp_path / "model", time.process_time()
    trained(folder, prose.read_text("utf-8"), STEPS, seed, family)
    seconds = time.process_time() - before
    print(f"\n{family}, seed {seed}: {seconds:.0f} s, perplexity {perplexity(folder, unseen.read_text('utf-8')):.0f}")
    tokenizer = load_tokenizer(folder)
    calibration = spread_windows(prose, tokenizer, effort("balanced").calibration_windows, WINDOW)
    evaluation = file_windows(unseen, tokenizer, EVALUATION_WINDOWS, WINDOW)
    with open_model(str(folder)) as model:
        original = Reference.of_original(model, evaluation.tokens)
        for target in (one for one, families in TRAINED.items() if family in families):
            pair = measured_pair(model, target, original, calibration, evaluation, tmp_path / "artifact")
            tools = ("torch", *facts_of(target).runtime_libraries)
            FAMILIES.keep(seeded(family, target, seed), identity(model, calibration, evaluation, tools), pair)


def measured_pair(
    model: Model, target: str, original: Reference, calibration: Windows, evaluation: Windows, folder: Path
) -> list[Row]:
    """Return round to nearest, and ours of no more bytes."""
    made, name = load_target(target), NEAREST[target]
    with removed(folder):
        folder.mkdir()
        compression = Compression(model, made.decide(model, name, "rtn"), effort=effort("fast"))
        nearest = measured(original, lower(made, compression, name, folder).artifact, name, "nearest")
    with removed(folder):
        ours = Exporter(model, target, calibration, evaluation).made(nearest.file_bytes, folder)
        return [nearest, measured(original, ours.artifact, name, "ours", ours.predicted)]


@pytest.mark.parametrize(
    ("target", "family"), [(target, family) for target, families in TRAINED.items() for family in families]
)
def test_a_budget_beats_round_to_nearest(target: str, family: str) -> None:
    """Runs after the measurements above, whose rows it reads."""
    ratios = [ours.kl_mean / nearest.kl_mean for nearest, ours in family_pairs(family, target)]
    assert len(ratios) == len(SEEDS) and median(ratios) <= MOST_RATIO
