"""The interface through which a target's artifacts are compiled for neural processors, and run on their emulators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.device.neural import NeuralProcessor
from exporter.device.profile import DeviceProfile
from exporter.formats.format import Float32
from exporter.formats.group import Decision
from exporter.foundation.errors import MissingDependencyError
from exporter.model.model import Model
from exporter.targets.artifact import Artifact, optional_part

Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Compiled:
    """The compiled parts of an artifact.

    Attributes:
        files: Files beside the artifact's own that were written.
        nodes: Nodes of the part that reads prompts.
        placed: Of these, nodes on the neural processor.
        products: Of these, matrix multiplications.
        others: Operator -> number of nodes that stay on the CPU.
        seconds: Time to compile.
    """

    files: tuple[Path, ...]
    nodes: int
    placed: int
    products: int
    others: dict[str, int]
    seconds: float


class Npu(Protocol):
    """Compiles and emulates a target's artifacts; the target's module `npu.proof` exports it as `NPU`.

    Attributes:
        title: Name of the emulator, for the user.
        terms: Name of the licence of what compiles and emulates, which is shown before either.
        licence: Sentence on the terms of what compiles and emulates.
        unseen: Sentence on what the emulator cannot show.
    """

    title: str
    terms: str
    licence: str
    unseen: str

    def hindrance(self, processor: NeuralProcessor, model: Model) -> str | None:
        """Return why the artifacts of a model have no part for a processor; None if they have."""

    def require_installed(self) -> None:
        """Require what compiles and emulates.

        Raises:
            MissingDependencyError: it is missing or of another version; the message says what to do.
        """

    def products(self, model: Model) -> int:
        """Return the number of matrix multiplications that are to be on the processor."""

    def compiled_bytes(self, decisions: Sequence[Decision]) -> int:
        """Return the bytes that `compile` is expected to write for the layers' matrices."""

    def compile(self, artifact: Artifact, processor: NeuralProcessor) -> Compiled:
        """Compile the artifact's part for a processor, in the artifact's folder; the artifact then uses the result."""

    def logits(self, artifact: Artifact, processor: NeuralProcessor, tokens: list[int], advance: Advance) -> Float32:
        """Return the logits after each token on the emulator, float32 [tokens, vocab].

        Args:
            artifact: The artifact, compiled.
            processor: The processor to emulate.
            tokens: Token ids, whole windows of the stage that reads prompts.
            advance: Called with windows done and their total.
        """

    def generate(self, artifact: Artifact, emulated: bool, prompt: list[int], count: int) -> list[int]:
        """Return greedy tokens: of the compiled part on the emulator, or of the artifact itself on the CPU."""


def processor_of(device: DeviceProfile) -> NeuralProcessor | None:
    """Return the neural processor of a device; None if its profile names none."""
    return next((backend.npu for backend in device.backends if backend.npu is not None), None)


def npu_target(name: str) -> Npu | None:
    """Return the `Npu` of a target, or None if it has none."""
    part = optional_part(name, "npu/proof")
    return None if part is None else part.NPU


def compiled_bytes(target: str, device: DeviceProfile, model: Model, decisions: Sequence[Decision]) -> int:
    """Return the bytes that a build is expected to compile for a device's neural processor; 0 where it compiles none.

    Args:
        target: The target's name.
        device: The device.
        model: The model that the artifact is of.
        decisions: One for each of its matrices.
    """
    npu, processor = npu_target(target), processor_of(device)
    if npu is None or processor is None or npu.hindrance(processor, model) is not None:
        return 0
    try:
        npu.require_installed()
    except MissingDependencyError:
        return 0
    return npu.compiled_bytes(decisions)
