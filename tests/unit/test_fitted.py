"""Fitted constants say what they are, how they are known, and which command shows how good a value is."""

from importlib.resources import files
from pathlib import Path

import pytest

import exporter
from exporter.compress import awq_scaling, error_propagation
from exporter.compress.methods import ldlq
from exporter.foundation.fitted import FILE, fitted_constants
from exporter.stages import predicted_times

ROOT = Path(exporter.__file__).parents[1]
PACKAGES = [
    *sorted(f"exporter.{path.parent.name}" for path in (ROOT / "exporter").glob(f"*/{FILE}")),
    *sorted(f"exporter.targets.{path.parent.name}" for path in (ROOT / "targets").glob(f"*/{FILE}")),
]


def test_every_file_is_known() -> None:
    targets = [f"exporter.targets.{name}" for name in ("gguf", "onnx", "onnx_qdq")]
    assert ["exporter.compress", "exporter.planning", "exporter.stages", *targets] == PACKAGES


@pytest.mark.parametrize("package", PACKAGES)
def test_a_fitted_constant_names_a_command_that_is_there(package: str) -> None:
    found = fitted_constants(package)
    assert (files(package) / FILE).is_file() and found
    for name, constant in found.items():
        assert (ROOT / constant.command.split()[3]).is_file(), name
        assert constant.on and constant.meaning, name


def test_the_code_uses_them() -> None:
    compress, stages = (fitted_constants(f"exporter.{package}") for package in ("compress", "stages"))
    assert compress["ldlq_damping"].value == ldlq.DAMPING
    assert compress["awq_alpha"].value == awq_scaling.AWQ_ALPHA
    used = (error_propagation.INPUTS_SHARE, error_propagation.STREAM_SHARE, error_propagation.RIDGE)
    assert used == tuple(
        compress[name].value for name in ("propagated_inputs_share", "propagated_stream_share", "propagation_ridge")
    )
    assert {name.upper() for name in stages} <= set(vars(predicted_times))
