"""Tokenizers and chat templates of artifacts, loaded without weights."""

from typing import Any, Protocol

from exporter.child.process import Child
from exporter.model.chat import LOAD_S, TEXT_BYTES, Renderer
from exporter.targets.artifact import Artifact, part_of


class TextRuntime(Renderer, Protocol):
    """The tokenizer and the chat template of an artifact, inside a child process."""

    title: str

    def __init__(self, artifact: Artifact) -> None:
        """Load the tokenizer and the chat template of an artifact."""

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime passes them to the model; special tokens in the text are recognised."""

    def known_differences(self) -> dict[str, str]:
        """Return the texts to which the runtime gives other ids than the model's tokenizer.

        Returns:
            Regular expression that such texts match (see `exporter.model.known_differences`) -> why they differ.
        """

    def ends(self) -> list[int]:
        """Return the ids at which the runtime itself ends a text."""


def open_text(artifact: Artifact) -> Child:
    """Load an artifact's tokenizer and chat template as a `TextRuntime` in a child process.

    Raises:
        InputError: the runtime refuses the artifact.
        RuntimeCrashError: the runtime crashed or took too long.
    """
    runtime: Any = part_of(artifact.target, "text")
    child = Child(runtime.TEXT.title, TEXT_BYTES)
    try:
        child.make(runtime.TEXT, LOAD_S, artifact)
        child.ready()
    except BaseException:
        child.close()
        raise
    return child
