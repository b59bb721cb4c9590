"""What is sent to devices stands alone: it is Python 3.8 and imports nothing of the exporter."""

import ast
from pathlib import Path

import pytest

import exporter
from exporter.targets.artifact import target_names
from exporter.targets.facts import session_file
from tests.contract.test_layout import imported

ROOT = Path(exporter.__file__).resolve().parent.parent
SENT = [ROOT / "exporter/bench/probe.py", *sorted({session_file(name) for name in target_names()})]


@pytest.mark.parametrize("path", SENT, ids=lambda path: path.parent.name)
def test_a_file_that_is_sent_to_devices_stands_alone(path: Path) -> None:
    source = path.read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))
    assert "from __future__ import annotations" in source
    assert not {name for name in imported(source) if name.split(".")[0] in ("exporter", "targets")}
