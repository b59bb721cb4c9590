"""Artifacts and how they are loaded; nothing here needs the libraries that write them."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from exporter.foundation.registry import folders, load


@dataclass(frozen=True)
class Artifact:
    """The files of a bundle's `model/` folder, as a runtime loads them.

    Attributes:
        target: Name of the target.
        folder: Folder of the files.
        weights: The model files; their sizes count as the model's size.
        coded: Whether the model files are coded; they stay coded in memory.
    """

    target: str
    folder: Path
    weights: tuple[Path, ...]
    coded: bool = False

    @property
    def file_bytes(self) -> int:
        """Size of the model in bytes."""
        return sum(path.stat().st_size for path in self.weights)


def share(source: Path, place: Path) -> None:
    """Hard-link a file, or copy it where that cannot be: ONNX Runtime follows no symbolic link out of a folder."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def target_names() -> list[str]:
    """Return the names of the targets."""
    return folders("exporter.targets", "target.py")


def part_of(target: str, part: str) -> ModuleType:
    """Return the module that holds a part of a target: the file of that name in its folder, or else `target.py`.

    Raises:
        RequestError: there is no such target.
    """
    module = part if target in folders("exporter.targets", f"{part}.py") else "target"
    return load(f"exporter.targets.{{}}.{module}", target, target_names(), "target")


def optional_part(target: str, part: str) -> ModuleType | None:
    """Return the module of a part that a target need not have, such as `npu/proof`; None if it has none."""
    known = folders("exporter.targets", f"{part}.py")
    if target not in known:
        return None
    return load(f"exporter.targets.{{}}.{part.replace('/', '.')}", target, known, "target")


def runtime_of(target: str) -> Any:
    """Return the class of a target's runtime; see `exporter.targets.runtime.Runtime`."""
    return part_of(target, "runtime").RUNTIME


def runs_coded(target: str) -> bool:
    """Return whether a target's artifacts can run while their files stay coded."""
    return target in folders("exporter.targets", "coded.py")


def coded_runtime_of(target: str) -> Any:
    """Return the class of a target's runtime for coded files; see `exporter.targets.runtime.CodedRuntime`."""
    return load("exporter.targets.{}.coded", target, folders("exporter.targets", "coded.py"), "target").RUNTIME
