"""The installation of the ARM64 system in which programs on emulated cores run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.machine import EmulatedMachine, qemu
from exporter.foundation.building import Digests
from exporter.foundation.cache_entries import folder_is_whole
from exporter.foundation.errors import MissingDependencyError

SETUP = "edge-exporter emulate setup"


def install_compiler(title: str) -> str:
    """Return how to install the compiler for a program."""
    return f"install what builds {title}: apt-get install g++-aarch64-linux-gnu cmake"


@dataclass(frozen=True)
class Program:
    """A program that is compiled for each kind of core from the source of a package.

    Attributes:
        title: Name of the runtime that it runs, for the user.
        files: What it loads, for the user.
        source: The package with its version, and its SHA-256 digests.
        inside: Pattern of the source's folder in the package.
        project: Folder of the CMake project; its target and its program are called as the folder.
        settings: CMake settings beside those of every program.
        source_setting: CMake setting for the source's folder.
        core_setting: CMake setting for the compilers' name of the core.
    """

    title: str
    files: str
    source: tuple[str, Digests]
    inside: str
    project: Path
    settings: Mapping[str, str]
    source_setting: str
    core_setting: str


@dataclass(frozen=True)
class Needs:
    """What runtimes need in the system.

    Attributes:
        wheels: Python packages with their versions -> their SHA-256 digests.
        program: A program; None if no runtime needs one.
    """

    wheels: Mapping[str, Digests] = field(default_factory=dict)
    program: Program | None = None


@dataclass(frozen=True)
class Installation:
    """The installation for programs on emulated cores; each part is a folder that is complete or absent.

    Attributes:
        folder: Folder of the installation.
    """

    folder: Path

    @property
    def root(self) -> Path:
        """The root of the ARM64 system."""
        return self.folder / "root"

    @property
    def packages(self) -> Path:
        """The folder of the Python packages."""
        return self.folder / "packages"

    @property
    def programs(self) -> Path:
        """The folder of the compiled programs, one for each kind of core."""
        return self.folder / "programs"

    def program(self, core: Core, title: str) -> Path:
        """Return the compiled program for a kind of core.

        Args:
            core: The core.
            title: Name of the runtime that the program runs.

        Raises:
            MissingDependencyError: it was not built, or is damaged.
        """
        path = self.programs / core.march
        if not (folder_is_whole(self.programs) and path.is_file()):
            raise MissingDependencyError(
                f"{title} is not built for ARM64", next_step=f"{install_compiler(title)}; run {SETUP}"
            )
        return path

    def machine(self, core: Core) -> EmulatedMachine:
        """Return a machine with a kind of core.

        Raises:
            MissingDependencyError: QEMU or the system is not installed, or the system is damaged.
        """
        qemu()
        if not (folder_is_whole(self.root) and folder_is_whole(self.packages)):
            raise MissingDependencyError("the ARM64 system is not set up", next_step=f"run {SETUP}")
        return EmulatedMachine(core, self.root, self.packages)
