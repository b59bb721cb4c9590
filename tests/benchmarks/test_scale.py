"""Models as large as devices take them: the memory and the time of a build, against what `plan` predicts.

Weights are random, in bfloat16, of the shapes of TinyLlama-1.1B and Llama-2-7B: memory and time do not depend on what
is in them. Of the 7B shape the first two layers are built, between its whole embedding and head; the rest follows by
the plan's own proportions. Times hold for an otherwise idle machine.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.resident import Resident, watched
from tests.benchmarks.synthetic import hollow_model, llama_2_7b, synthetic_model, tinyllama_1b
from tests.commands import cli
from tests.reference import plain_texts

# What a build of the 1.1B model may take, every page of every process counted.
MOST_BYTES = 3 << 30
BUDGET_BYTES = {"gguf": 640_000_000, "onnx": 680_000_000}
TEXTS = ("--calibration", "calibration.txt", "--evaluation", "evaluation.txt")
JOB = ("--device", "core-ultra-200v", "--effort", "fast", *TEXTS)
FIRST_LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts and the 1.1B model; both targets share its cache."""
    folder = tmp_path_factory.mktemp("scale")
    plain_texts(folder)
    synthetic_model(folder / "1b", tinyllama_1b())
    return folder


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_billion_weights_build_within_three_gibibytes(folder: Path, target: str) -> None:
    budget = ("--max-file-bytes", str(BUDGET_BYTES[target]))
    planned = _plan(folder, "1b", target, *budget)
    peak, seconds = _built(folder, "1b", target, *budget)
    _show(folder / target, planned, peak, seconds)
    assert _size(folder / target) <= BUDGET_BYTES[target]
    assert peak.total < MOST_BYTES
    assert 0.7 <= planned["build_peak_bytes"]["value"] / peak.total <= 1.5


def test_seven_billion_weights_are_planned_and_their_first_layers_built(folder: Path) -> None:
    hollow_model(folder / "7b", llama_2_7b())
    synthetic_model(folder / "7b-first", llama_2_7b(FIRST_LAYERS))
    whole, first = (_plan(folder, name, "gguf") for name in ("7b", "7b-first"))
    print("\nthe whole 7B shape, as planned:")
    for name in ("file_bytes", "build_peak_bytes", "runtime_peak_bytes", "disk_bytes", "cache_bytes"):
        print(f"  {name:20} {whole[name]['value'] / 1e9:8.2f} GB")
    for stage, seconds in whole["stage_seconds"].items():
        print(f"  {stage:20} {seconds['value'] / 3600:8.2f} hours")
    peak, seconds = _built(folder, "7b-first", "gguf")
    _show(folder / "gguf-7b-first", first, peak, seconds)
    share = seconds / first["build_seconds"]["value"]
    hours = share * whole["build_seconds"]["value"] / 3600
    print(f"the whole 7B shape, by the time of its first {FIRST_LAYERS} layers: {hours:.1f} hours")
    assert 0.7 <= first["build_peak_bytes"]["value"] / peak.total <= 1.5
    assert 0.5 <= share <= 2


def _plan(folder: Path, model: str, target: str, *more: str) -> dict[str, Any]:
    # A plan that does not fit the device is one all the same, with exit code 1.
    done = cli(folder, "plan", model, *JOB, "--target", target, *more, "--json")
    assert done.returncode in (0, 1), done.stderr
    planned: dict[str, Any] = json.loads(done.stdout)
    return planned


def _built(folder: Path, model: str, target: str, *more: str) -> tuple[Resident, float]:
    output = target if model == "1b" else f"{target}-{model}"
    return watched(folder, "build", model, *JOB, "--target", target, "-o", output, *more)


def _show(bundle: Path, planned: dict[str, Any], peak: Resident, seconds: float) -> None:
    stages = json.loads((bundle / "measurements.json").read_text("utf-8"))["stages"]
    print(
        f"\n{bundle.name}: {seconds:.0f} s in all, {_size(bundle):,.0f} bytes; stage, seconds predicted and taken, MiB"
    )
    for stage in stages:
        predicted = planned["stage_seconds"].get(stage["name"], {"value": 0.0})["value"]
        print(f"  {stage['name']:20} {predicted:7.1f} {stage['seconds']:7.1f} {stage['peak_bytes'] >> 20:7}")
    print(f"  most at once: {peak}; predicted {int(planned['build_peak_bytes']['value']) >> 20:,} MiB")


def _size(bundle: Path) -> float:
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    return float(report["size"]["file_bytes"]["value"])
