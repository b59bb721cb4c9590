"""What a runtime makes of text, from an artifact and without its weights."""

from typing import Any, Protocol

from exporter.child.process import Child
from exporter.foundation.registry import folders, load
from exporter.model.chat import LOAD_S, TEXT_BYTES, Renderer
from exporter.targets.artifact import Artifact


class TextRuntime(Renderer, Protocol):
    """The tokenizer and the chat template of an artifact, inside a child process."""

    title: str

    def __init__(self, artifact: Artifact) -> None:
        """Load what an artifact says of text."""

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime gives them to the model, special tokens in the text recognised."""

    def ends(self) -> list[int]:
        """Return the ids at which the runtime ends a text by itself."""


def open_text(artifact: Artifact) -> Child:
    """Load what an artifact says of text in a child process that makes a `TextRuntime`.

    Raises:
        InputError: the runtime refuses it.
        RuntimeCrashError: the runtime died of it, or took too long.
    """
    runtime: Any = load("exporter.targets.{}.text", artifact.target, folders("exporter.targets", "text.py"), "target")
    child = Child(runtime.TEXT.title, TEXT_BYTES)
    try:
        child.make(runtime.TEXT, LOAD_S, artifact)
        child.ready()
    except BaseException:
        child.close()
        raise
    return child
