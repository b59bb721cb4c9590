"""The public API: its names, what they are, and what importing it costs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import exporter

NAMES = [
    "Bundle", "CheckError", "ExporterError", "InputError", "Job", "MissingDependencyError", "Outline", "Plan",
    "RequestError", "__version__", "build", "plan", "read_plan", "verify",
]  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "python.md"


def test_the_names_are_these() -> None:
    assert exporter.__all__ == NAMES == dir(exporter)
    assert set(exporter._PLACES) == set(NAMES) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'compress_everything'"):
        exporter.compress_everything  # noqa: B018


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_each_name_is_documented_and_means_one_thing(name: str) -> None:
    found = getattr(exporter, name)
    assert found is getattr(exporter, name)
    assert (inspect.getdoc(found) or "").strip()
    assert f"`{name}" in PAGE.read_text("utf-8")


def test_importing_the_package_imports_none_of_its_parts() -> None:
    code = "import sys, exporter; print([name for name in sys.modules if name.startswith('exporter.')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
