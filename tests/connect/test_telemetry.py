"""Nothing reports home: what a user's commands look up, reach for and leave in a fresh home, native code included."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.bench.engine import Settings
from exporter.bench.measurement import measure_here
from exporter.targets.onnx.emulated import EMULATED_MAIN
from tests.connect.quiet import left_in, quietly

# In one process and its children; `build` is how the bundle was made.
USE = """
from exporter.cli.main import app

if __name__ == "__main__":
    for command in (
        ["run", "onnx", "-p", "hello", "-n", "2"],
        ["verify", "onnx"],
        ["bench", "onnx", "-p", "8", "-n", "4", "-r", "1"],
        ["emulate", "run", "onnx", "--device", "raspberry-pi-5", "--context", "64"],
    ):
        app([*command, "--json"], standalone_mode=False)
"""


def test_what_is_done_with_a_bundle(world: Path) -> None:
    (world / "use.py").write_text(USE)
    quietly(world, sys.executable, "use.py")


def test_programs_that_stand_alone(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    # Whoever starts them says nothing, or the contrary.
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    measure_here(world / "onnx", Settings(8, 4, 0, 64, 1, 0, 1), None)
    decoder = json.loads((world / "onnx/model/genai_config.json").read_text())["model"]["decoder"]
    model = {"path": str(world / "onnx/model/model.onnx"), "head_width": decoder["head_size"], "options": {}}
    request, logits = tmp_path / "request.json", tmp_path / "logits.npy"
    request.write_text(json.dumps({"model": model, "tokens": [1, 2, 3], "single": 1, "threads": 1}))
    subprocess.run([sys.executable, "-I", EMULATED_MAIN, request, logits], check=True)
    assert len(np.load(logits)) == 3
    assert left_in(tmp_path) == {"request.json", "logits.npy"}
