"""What the main job takes, against what `plan` predicted and what is promised: `make benchmark`.

Times hold for an otherwise idle machine; on a busy one the figures are printed all the same.
"""

import json
import time
from pathlib import Path

import pytest

from tests.commands import printed
from tests.reference import reference_model

PROMPT = "The capital of France is"
JOBS = (("gguf", "galaxy-s24-ultra"), ("onnx", "core-ultra-200v"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_model(tmp_path_factory.mktemp("reference") / "model")


@pytest.mark.parametrize(("target", "device"), JOBS)
def test_plan_predicts_a_cold_build(reference: Path, tmp_path: Path, target: str, device: str) -> None:
    asked = [str(reference), "--device", device, "--target", target]
    planned = json.loads(printed(tmp_path, "plan", *asked, "--json"))
    printed(tmp_path, "build", *asked, "-o", "bundle")
    made = json.loads((tmp_path / "bundle/measurements.json").read_text("utf-8"))
    report = json.loads((tmp_path / "bundle/report.json").read_text("utf-8"))
    print(f"\n{target}: stage, seconds predicted and taken, peak MiB")
    for stage in made["stages"]:
        predicted = planned["stage_seconds"].get(stage["name"], {"value": 0.0})["value"]
        print(f"  {stage['name']:20} {predicted:7.1f} {stage['seconds']:7.1f} {stage['peak_bytes'] >> 20:7}")
    peak = max(stage["peak_bytes"] for stage in made["stages"])
    found = {
        "build_seconds": sum(stage["seconds"] for stage in made["stages"]),
        "build_peak_bytes": peak,
        "file_bytes": report["size"]["file_bytes"]["value"],
        "runtime_peak_bytes": made["memory"]["peak_bytes"]["value"],
    }
    shares = {name: planned[name]["value"] / value for name, value in found.items()}
    for name, share in shares.items():
        print(f"  {name:20} predicted {planned[name]['value']:,.0f}, found {found[name]:,.0f}, ratio {share:.3f}")
    assert peak < 2 << 30
    assert all(0.8 <= share <= 1.2 for share in shares.values())


def test_the_demo_job_takes_under_three_minutes(tmp_path: Path) -> None:
    started = time.perf_counter()
    for target, device in JOBS:
        printed(tmp_path, "build", "demo", "--device", device, "--target", target, "--effort", "fast", "-o", target)
    for target, _ in JOBS:
        assert "Paris" in printed(tmp_path, "run", target, "-p", PROMPT)
        printed(tmp_path, "verify", target)
    seconds = time.perf_counter() - started
    print(f"\nbuild, run and verify for two devices: {seconds:.0f} s")
    assert seconds < 180
