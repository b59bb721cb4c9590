"""The main job on the embedded 135M model: a bundle for each target answers, verifies and keeps its promises."""

import json
from pathlib import Path

import pytest

from tests.commands import printed

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.mark.parametrize(
    ("target", "type", "device", "most_kl"),
    [("gguf", "Q4_K_M", "galaxy-s24-ultra", 0.1), ("onnx", "int4", "core-ultra-200v", 0.25)],
)
def test_demo_answers_and_verifies(folder: Path, target: str, type: str, device: str, most_kl: float) -> None:
    printed(
        folder,
        "build",
        "demo",
        "--device",
        device,
        "--target",
        target,
        "--type",
        type,
        "--effort",
        "fast",
        "-o",
        target,
    )
    printed(folder, "verify", target)
    answer = printed(folder, "run", target, "-p", "The capital of France is")
    assert "Paris" in answer
    facts = json.loads(printed(folder, "inspect", target, "--json"))
    assert facts["verdict"] == "passed"
    assert facts["accuracy"]["kl_mean"]["value"] < most_kl
    assert facts["accuracy"]["runtime_rounding_kl"]["value"] < 0.02
