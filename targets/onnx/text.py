"""onnxruntime-genai's tokenizer, from the files next to a graph."""

from exporter.targets.artifact import Artifact
from exporter.targets.onnx.tokenize import GenaiTokenizer


class GenaiText(GenaiTokenizer):
    """The tokenizer of an artifact; see `exporter.targets.text.TextRuntime`."""

    title = "ONNX Runtime"

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact.folder)


TEXT = GenaiText
