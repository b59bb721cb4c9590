"""Bundles that version 0.1.0 made are verified, inspected and run by this version."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.commands import cli, printed

pytestmark = pytest.mark.slow

BUNDLES = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
TARGETS = ("gguf", "onnx", "onnx-qdq")


@pytest.fixture(params=TARGETS)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(BUNDLES / f"{request.param}.tar.xz") as packed:
        packed.extractall(tmp_path / "old", filter="data")
    return tmp_path / "old"


def test_is_verified_inspected_and_run(bundle: Path, tmp_path: Path) -> None:
    verdict = json.loads(printed(tmp_path, "verify", "old", "--json"))
    states = {check["name"]: check["status"] for check in verdict["checks"]}
    assert states["selftest"] == "passed"
    assert set(states.values()) == {"passed"}
    facts = json.loads(printed(tmp_path, "inspect", "old", "--json"))
    assert facts["verdict"] == "passed"
    assert facts["model"]["architecture"] == "LlamaForCausalLM"
    answer = json.loads(printed(tmp_path, "run", "old", "-p", "the capital of", "-n", "4", "--json"))
    assert answer["prompt"] == "the capital of"


def test_a_changed_byte_of_an_old_bundle_is_found(bundle: Path, tmp_path: Path) -> None:
    weights = max((bundle / "model").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert cli(tmp_path, "verify", "old").returncode != 0
