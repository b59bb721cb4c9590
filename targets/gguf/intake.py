"""A GGUF artifact is numbers and text: llama.cpp loads nothing that the files name."""

from collections.abc import Collection
from pathlib import Path

from exporter.foundation.errors import InputError
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.modelfile import MODELFILE, modelfile
from exporter.targets.intake import Read


class GgufIntake:
    """One model file and one adapter, of these names alone; see `exporter.targets.intake.Intake`."""

    weights = ("model.gguf", "adapter.gguf")
    required = 1

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """Return the artifact as it is, once its Modelfile, from which Ollama loads it, is found to be ours."""
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
