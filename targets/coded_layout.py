"""Finds the layout of a target's file for coding; the module `coded_layout` of each target knows its own files."""

from pathlib import Path

from exporter.coding.layout import FileSection
from exporter.foundation.registry import folders, load


def layout_of(path: Path) -> list[FileSection]:
    """Return the known sections of a file; none for a file that no target knows.

    Raises:
        InputError: the file cannot be read as what it says it is.
    """
    known = folders("exporter.targets", "coded_layout.py")
    for name in known:
        found: list[FileSection] | None = load("exporter.targets.{}.coded_layout", name, known, "target").layout_of(
            path
        )
        if found is not None:
            return found
    return []
