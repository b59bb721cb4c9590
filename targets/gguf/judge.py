"""Runs a GGUF file in OpenVINO, which reads it by code of its own (in openvino-genai)."""

from pathlib import Path

from exporter.foundation.errors import InputError
from exporter.model.gguf_reader import open_gguf
from exporter.targets.artifact import Artifact
from exporter.targets.contract import MOST_LOWERING_KL
from exporter.targets.openvino import OpenVino, named_failure, openvino

# What OpenVINO 2026.4 makes of the types of matrices, measured on small models. It keeps the codes and scales of some,
# stores some in float16, and refuses the others, or rounds their minimums to whole codes (Q4_1, Q4_K: up to 0.9 nats).
KEPT = frozenset({"Q4_0", "Q8_0"})
IN_FLOAT16 = frozenset({"F16", "Q6_K"})
# Float16 has 11 bits: up to 1e-4 on small random models. A type that is rounded to other codes costs more than this.
MOST_KL_IN_FLOAT16 = 1e-3
CONVERTED = "openvino_model.xml"


class GgufInOpenVino(OpenVino):
    """A GGUF file; see `exporter.targets.judge.Judge`."""

    modules = ("openvino", "openvino_genai")

    def __init__(self, artifact: Artifact, folder: Path, threads: int) -> None:
        path, *others = artifact.weights
        if others:
            raise InputError(f"{self.title} applies no adapter to a GGUF file", got=others[0].name)
        types = {tensor.tensor_type.name for tensor in open_gguf(path).tensors if len(tensor.shape) > 1}
        if types - KEPT - IN_FLOAT16:
            raise InputError(
                f"{self.title} refuses or re-rounds types of this GGUF file",
                got=", ".join(sorted(types - KEPT - IN_FLOAT16)),
                expected=f"none but {', '.join(sorted(KEPT | IN_FLOAT16))}",
            )
        self._kept = types <= KEPT
        # The pipeline gives no logits, but it saves the model that it converts beside the file.
        given = folder / path.name
        given.symlink_to(path.resolve())
        openvino()
        import openvino_genai

        with named_failure(self.title):
            openvino_genai.LLMPipeline(str(given), "CPU", enable_save_ov_model=True)
        super().__init__(folder / CONVERTED, threads)

    def most_kl(self) -> float:
        """Return the limit of float32 sums in another order, or that of weights in float16."""
        return MOST_LOWERING_KL if self._kept else MOST_KL_IN_FLOAT16


JUDGE = GgufInOpenVino
