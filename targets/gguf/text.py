"""llama.cpp's tokenizer for an artifact: only the vocabulary of its GGUF file."""

from exporter.targets.artifact import Artifact
from exporter.targets.gguf.session import ADAPTER_FILE
from exporter.targets.gguf.tokenize import LlamaTokenizer


class LlamaText(LlamaTokenizer):
    """The vocabulary of an artifact; see `exporter.targets.text.TextRuntime`."""

    title = "llama.cpp"

    def __init__(self, artifact: Artifact) -> None:
        (path,) = (file for file in artifact.weights if file.name != ADAPTER_FILE)
        super().__init__(path)


TEXT = LlamaText
