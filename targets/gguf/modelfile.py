"""The file by which Ollama finds a GGUF model and its adapter."""

from collections.abc import Iterable

MODELFILE = "Modelfile"


def modelfile(files: Iterable[str]) -> str:
    """Return the text for a model file, followed by its adapter where there is one."""
    return "".join(f"{word} ./{file}\n" for word, file in zip(("FROM", "ADAPTER"), files, strict=False))
