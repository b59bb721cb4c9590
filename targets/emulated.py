"""What a target must say so that its artifacts run on emulated Arm cores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.installation import Installation
from exporter.formats.format import Float32
from exporter.foundation.registry import folders, load
from exporter.targets.artifact import Artifact


@dataclass(frozen=True)
class Run:
    """Some tokens for a runtime on an emulated core.

    Attributes:
        installation: The system to run in.
        core: The core.
        tokens: Token ids.
        single: How many of the last of them come one at a time, with the keys and values of those before.
        threads: Threads to compute with.
        timeout_s: Seconds after which the run is ended.
    """

    installation: Installation
    core: Core
    tokens: list[int]
    single: int
    threads: int
    timeout_s: float


class Setting(Protocol):
    """A way to round activations; `reason` says it to people."""

    @property
    def reason(self) -> str:
        """What it does, for people."""


class Emulated(Protocol):
    """One target's artifacts on emulated cores; a target has it as `EMULATED` of its module `emulated`.

    Attributes:
        title: The runtime, for people.
        exact: Activations in float32.
    """

    title: str
    exact: Setting

    def require(self, installation: Installation, core: Core) -> None:
        """Refuse where what runs artifacts on a core is not installed.

        Raises:
            MissingDependencyError: it says what to do.
        """

    def rounds(self, core: Core) -> bool:
        """Return whether kernels for a core may round activations."""

    def current(self, artifact: Artifact) -> Setting:
        """Return how the artifact has activations rounded."""

    def candidates(self, artifact: Artifact, core: Core) -> Mapping[str, Setting]:
        """Return what may be chosen between on a core, by name, the quickest first; the current one is among it."""

    def configured(self, artifact: Artifact, setting: Setting, folder: Path) -> Artifact:
        """Write the artifact with a setting into a folder, its own or another, and return it."""

    def logits(self, artifact: Artifact, run: Run) -> Float32:
        """Run an artifact on an emulated core.

        Args:
            artifact: What to run.
            run: On what, and where.

        Returns:
            The logits after each token, float32 [tokens, vocab].

        Raises:
            IllegalInstructionError: the runtime met an instruction that the core does not have.
            RuntimeCrashError: it failed otherwise.
        """


def emulated_target(name: str) -> Emulated | None:
    """Return what a target says for emulated cores; None where it says nothing."""
    known = folders("exporter.targets", "emulated.py")
    if name not in known:
        return None
    found: Emulated = load("exporter.targets.{}.emulated", name, known, "target").EMULATED
    return found
