"""What a runtime makes of text, from an artifact and without its weights."""

from typing import Any, Protocol

from exporter.child import Child
from exporter.model.chat import LOAD_S, Chat, Rendered
from exporter.registry import folders, load
from exporter.targets.artifact import Artifact


class TextRuntime(Protocol):
    """The tokenizer and the chat template of an artifact, inside a child process."""

    title: str
    serves: bool

    def __init__(self, artifact: Artifact) -> None:
        """Load what an artifact says of text."""

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime gives them to the model, special tokens in the text recognised."""

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Return a chat as the runtime renders it.

        Args:
            chat: Messages with `role` and `content`.
            prompt: Ask for the start of an answer at the end.

        Raises:
            RequestError: the artifact holds no chat template.
        """

    def ends(self) -> list[int]:
        """Return the ids at which the runtime ends a text by itself."""


def open_text(artifact: Artifact) -> Child:
    """Load what an artifact says of text in a child process that serves `TextRuntime`.

    Raises:
        InputError: the runtime refuses it.
        RuntimeCrashError: the runtime died of it, or took too long.
    """
    runtime: Any = load("exporter.targets.{}.text", artifact.target, folders("exporter.targets", "text.py"), "target")
    child = Child(runtime.TEXT.title, runtime.TEXT, artifact)
    try:
        child.result(LOAD_S)
    except BaseException:
        child.close()
        raise
    return child
