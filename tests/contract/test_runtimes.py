"""Runtimes in child processes: their memory is measured as the runtime's, so nothing else may come along."""

import subprocess
import sys

import pytest

from exporter.targets.artifact import target_names

HEAVY = ("torch", "transformers", "scipy", "onnx_ir")


@pytest.mark.parametrize("part", ["runtime", "text"])
@pytest.mark.parametrize("target", target_names())
def test_a_runtime_brings_no_other_libraries_along(target: str, part: str) -> None:
    module = f"exporter.targets.{target.replace('-', '_')}.{part}"
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.splitlines()[-1] == "[]"
