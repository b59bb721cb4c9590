"""GGUF files as sources; see `exporter.targets.sources`."""

from collections.abc import Sequence
from pathlib import Path

from exporter.model.gguf_file import open_whole
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.as_float import write_as_float


class GgufSource:
    """A GGUF file, rewritten in float32 for llama.cpp; see `exporter.targets.sources.SourceFiles`."""

    target = "gguf"
    suffix = ".gguf"
    kind = "GGUF"

    def in_float32(self, path: Path, folder: Path, layers: Sequence[int] | None) -> Artifact:
        """Rewrite a file in float32."""
        written = folder / "source.gguf"
        write_as_float(open_whole(path), written, layers)
        return Artifact(self.target, folder, (written,))


SOURCE = GgufSource()
