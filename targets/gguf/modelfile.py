"""The Modelfile from which Ollama loads a GGUF model and its adapter."""

from collections.abc import Iterable

MODELFILE = "Modelfile"


def modelfile(files: Iterable[str]) -> str:
    """Return the Modelfile for a model file and an optional adapter."""
    return "".join(f"{word} ./{file}\n" for word, file in zip(("FROM", "ADAPTER"), files, strict=False))
