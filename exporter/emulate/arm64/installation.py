"""The installation of the ARM64 system in which programs on emulated cores run."""

from dataclasses import dataclass
from pathlib import Path

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.machine import EmulatedMachine, qemu
from exporter.foundation.cache_entries import folder_is_whole
from exporter.foundation.errors import MissingDependencyError

SETUP = "edge-exporter emulate setup"
INSTALL_COMPILER = "install what builds llama.cpp: apt-get install g++-aarch64-linux-gnu cmake"


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
        """The folder of the programs with llama.cpp, one for each kind of core."""
        return self.folder / "programs"

    def program(self, core: Core) -> Path:
        """Return the llama.cpp program for a kind of core.

        Raises:
            MissingDependencyError: it was not built, or is damaged.
        """
        path = self.programs / core.march
        if not (folder_is_whole(self.programs) and path.is_file()):
            raise MissingDependencyError(
                "llama.cpp is not built for ARM64", next_step=f"{INSTALL_COMPILER}; run {SETUP}"
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
