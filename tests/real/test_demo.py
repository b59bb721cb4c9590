"""The main job on the embedded 135M model: a bundle for each target answers, verifies and keeps its promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]


def cli(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"EDGE_EXPORTER_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "exporter.cli.main", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.mark.parametrize(
    ("target", "type", "device", "most_kl"),
    [("gguf", "Q4_K_M", "galaxy-s24-ultra", 0.1), ("onnx", "int4", "core-ultra-200v", 0.25)],
)
def test_demo_answers_and_verifies(folder: Path, target: str, type: str, device: str, most_kl: float) -> None:
    cli(folder, "build", "demo", "--device", device, "--target", target, "--type", type, "-o", target)
    cli(folder, "verify", target)
    answer = cli(folder, "run", target, "-p", "The capital of France is")
    assert "Paris" in answer
    facts = json.loads(cli(folder, "inspect", target, "--json"))
    assert facts["verdict"] == "passed"
    assert facts["accuracy"]["kl_mean"]["value"] < most_kl
    assert facts["accuracy"]["runtime_rounding_kl"]["value"] < 0.02
