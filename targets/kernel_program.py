"""The interface through which a runtime's kernels are timed on a device, by a program that needs nothing there."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.foundation.building import Digests
from exporter.foundation.registry import folders, load


@dataclass(frozen=True)
class KernelProgram:
    """A program that times kernels, compiled for a processor from the source of a package.

    It is called with threads, rounds, the bytes of the matrices that one round goes through, the tokens of a prompt,
    the format with which all take turns, and the formats. It prints a document of `exporter.bench.results.KernelTimes`.

    Attributes:
        target: The target.
        runtime: Its runtime with the version of the kernels, for the user.
        source: The package with its version, and its SHA-256 digests.
        inside: Pattern of the source's folder in the package.
        project: Folder of the CMake project; its target and its program are called as the folder.
        source_setting: CMake setting for the source's folder.
        settings: Architecture (`aarch64` or `x86_64`) and the processor's features, named as in profiles -> CMake
            settings.
        reference: The format with which all take turns.
        formats: The formats.
    """

    target: str
    runtime: str
    source: tuple[str, Digests]
    inside: str
    project: Path
    source_setting: str
    settings: Callable[[str, Collection[str]], Mapping[str, str]]
    reference: str
    formats: tuple[str, ...]


def kernel_program() -> KernelProgram:
    """Return the program of the first target that has one; the target's module `kernels` exports it as `KERNELS`."""
    (name, *_) = known = folders("exporter.targets", "kernels.py")
    found: KernelProgram = load("exporter.targets.{}.kernels", name, known, "target").KERNELS
    return found
