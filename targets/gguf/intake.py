"""Checks of a GGUF artifact. It holds only numbers and text; llama.cpp loads no files that it names."""

from collections.abc import Collection
from pathlib import Path

from exporter.foundation.errors import InputError
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.modelfile import MODELFILE, modelfile
from exporter.targets.intake import Read


class GgufIntake:
    """Accepts one model file and one adapter, with fixed names; see `exporter.targets.intake.Intake`."""

    weights = ("model.gguf", "adapter.gguf")
    required = 1

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """Return the artifact unchanged, after checking that Ollama's Modelfile is one that this exporter writes."""
        del folder
        if MODELFILE in names:
            expected = modelfile([name for name in self.weights if name in names]).encode()
            if read(MODELFILE, len(expected)) != expected:
                raise InputError(
                    "the Modelfile is not one that edge-exporter writes", where=artifact.folder / MODELFILE,
                    expected=repr(expected.decode()), next_step="get the bundle again",
                )  # fmt: skip
        return artifact


INTAKE = GgufIntake()
