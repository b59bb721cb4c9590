"""The checks are those of the target `onnx`; the data may lie in the folder of the pipeline for neural processors.

The pipeline's own files are not loaded from a bundle by this exporter, and are compared with the manifest only.
"""

from collections.abc import Collection
from pathlib import Path

from exporter.foundation.errors import InputError
from exporter.targets.artifact import Artifact
from exporter.targets.intake import Read
from exporter.targets.onnx.intake import NEXT_STEP, OnnxIntake
from exporter.targets.onnx.settings import DATA_FILE, MODEL_FILE
from exporter.targets.onnx_qdq.npu import DATA_IN_PIPELINE


class QdqIntake(OnnxIntake):
    """Accepts a graph with its data beside it or in the pipeline's folder."""

    weights = (MODEL_FILE, DATA_FILE, DATA_IN_PIPELINE)
    required = 1

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """See `exporter.targets.intake.Intake`."""
        if len(artifact.weights) != 2:
            raise InputError(
                "the manifest lists another number of data files than one", where=artifact.folder,
                got=len(artifact.weights) - 1, expected=f"{DATA_FILE} or {DATA_IN_PIPELINE}", next_step=NEXT_STEP,
            )  # fmt: skip
        return super().admit(artifact, names, read, folder)


INTAKE = QdqIntake()
