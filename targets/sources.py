"""Files of a target that are a job's source, run by the target's own runtime as a reference for what was read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from exporter.foundation.registry import folders, load
from exporter.targets.artifact import Artifact


class SourceFiles(Protocol):
    """The files of a target as sources; its module `source` exports them as `SOURCE`.

    Attributes:
        target: The target's name.
        suffix: Suffix of the files.
        kind: Their kind, for the user.
    """

    target: str
    suffix: str
    kind: str

    def in_float32(self, path: Path, folder: Path, layers: Sequence[int] | None) -> Artifact:
        """Rewrite a file in float32, with all its keys and tensors, for the target's runtime.

        Args:
            path: The file, or the first part of one that is split.
            folder: Receives the artifact.
            layers: The layers to write, which are renumbered from 0; None for all.
        """


def source_files_of(path: Path) -> SourceFiles:
    """Return the target whose files a source is."""
    known = folders("exporter.targets", "source.py")
    found: list[SourceFiles] = [load("exporter.targets.{}.source", name, known, "target").SOURCE for name in known]
    return next(one for one in found if path.name.endswith(one.suffix))
