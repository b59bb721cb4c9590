"""llama.cpp's tokenizer for an artifact: only the vocabulary of its GGUF file, and the text of its adapter."""

from exporter.model.chat import Chat, Rendered
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.adapter_keys import read_adapter_text
from exporter.targets.gguf.session import ADAPTER_FILE
from exporter.targets.gguf.tokenize import LlamaTokenizer, render_with


class LlamaText(LlamaTokenizer):
    """The vocabulary of an artifact; see `exporter.targets.text.TextRuntime`."""

    title = "llama.cpp"

    def __init__(self, artifact: Artifact) -> None:
        (path,) = (file for file in artifact.weights if file.name != ADAPTER_FILE)
        adapters = [read_adapter_text(file) for file in artifact.weights if file != path]
        super().__init__(path)
        self._own = adapters[0] if adapters else None

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Return a chat rendered by the template of a fine-tune that is kept beside its base, or else by the file's."""
        if self._own is None:
            return super().render_chat(chat, prompt)
        return render_with(self._own.template, self._own.eos, self._model, chat, prompt)


TEXT = LlamaText
