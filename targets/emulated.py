"""The interface through which a target's artifacts run on emulated Arm cores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.installation import Installation, Needs
from exporter.formats.format import Float32
from exporter.foundation.registry import folders, load
from exporter.targets.artifact import Artifact, optional_part


@dataclass(frozen=True)
class Run:
    """Tokens to run through an artifact on an emulated core.

    Attributes:
        installation: The system to run in.
        core: The core.
        tokens: Token ids.
        single: Number of last tokens that are decoded one at a time, with the cached keys and values of those before.
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
    """A way to round activations; `reason` describes it to the user."""

    @property
    def reason(self) -> str:
        """A description for the user."""


class Emulated(Protocol):
    """Runs a target's artifacts on emulated cores; the target's module `emulated` exports it as `EMULATED`.

    Attributes:
        title: Name of the runtime, for the user.
        exact: The setting with activations in float32.
    """

    title: str
    exact: Setting

    def require(self, installation: Installation, core: Core) -> None:
        """Require that the programs for a core are installed.

        Raises:
            MissingDependencyError: they are not; the message says what to do.
        """

    def rounds(self, core: Core) -> bool:
        """Return whether kernels for a core may round activations."""

    def current(self, artifact: Artifact) -> Setting:
        """Return how the artifact rounds activations."""

    def candidates(self, artifact: Artifact, core: Core) -> Mapping[str, Setting]:
        """Return the settings available on a core, by name, fastest first; they include the current one."""

    def configured(self, artifact: Artifact, setting: Setting, folder: Path) -> Artifact:
        """Write the artifact with a setting into a folder (its own or another) and return it."""

    def logits(self, artifact: Artifact, run: Run) -> Float32:
        """Run an artifact on an emulated core.

        Args:
            artifact: The artifact.
            run: The tokens, the core and the limits.

        Returns:
            The logits after each token, float32 [tokens, vocab].

        Raises:
            IllegalInstructionError: the runtime executed an instruction that the core does not have.
            RuntimeCrashError: it failed in another way.
        """


def emulated_target(name: str) -> Emulated | None:
    """Return the `Emulated` of a target, or None if it has none."""
    part = optional_part(name, "emulated")
    return None if part is None else part.EMULATED


def emulation_needs() -> Needs:
    """Return what all runtimes need in the emulated system; the module `emulated_needs` of a target exports `NEEDS`."""
    known = folders("exporter.targets", "emulated_needs.py")
    found: list[Needs] = [load("exporter.targets.{}.emulated_needs", name, known, "target").NEEDS for name in known]
    wheels = {name: digests for needs in found for name, digests in needs.wheels.items()}
    return Needs(wheels, next((needs.program for needs in found if needs.program is not None), None))
