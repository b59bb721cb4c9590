"""A model as the pipeline sees it: facts, lazy tensors, and a folder with config and tokenizer."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from transformers import PretrainedConfig

from exporter.formats.format import Float32
from exporter.formats.group import WeightGroup
from exporter.foundation.cache_entries import Identity, identity
from exporter.foundation.errors import InputError
from exporter.model.architecture import Architecture
from exporter.model.tensors import INDEX, TensorSource

# All that a tokenizer of transformers, or this package, may read beside the weights.
METADATA = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "tokenizer.model.*", "*.tiktoken",
    "*.tokenizer", "merges.txt", "vocab.txt", "dict.txt",
)  # fmt: skip


class SourceFiles:
    """The files that a model is read from, as they were when this was made.

    Args:
        find: Returns them.
    """

    def __init__(self, find: Callable[[], Iterable[Path]]) -> None:
        self._find = find
        self._found = self._look()

    def _look(self) -> dict[Path, Identity]:
        return {path: _state(path) for path in self._find()}

    def require_unchanged(self) -> None:
        """Refuse to go on where a file was changed, added or taken away.

        Raises:
            InputError: see above.
        """
        differing = dict(self._look().items() ^ self._found.items())
        if differing:
            raise _changed(min(differing))


def _state(path: Path) -> Identity:
    try:
        return identity(path.stat())
    except OSError:
        # A link that leads nowhere: whoever reads it says so.
        return ()


def _changed(where: object) -> InputError:
    return InputError(
        "the source changed while it was read, so nothing is written", where=where,
        next_step="run it again when nothing writes there",
    )  # fmt: skip


def metadata_files(folder: Path) -> list[Path]:
    """Return the files of a folder that say how a model's text becomes tokens, and what the model is."""
    found = {path for pattern in METADATA for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name != INDEX and path.is_file())


@dataclass(frozen=True)
class Model:
    """A decoder with lazy weights.

    Attributes:
        name: Short name for files and titles.
        origin: Where it came from, as a reader of the report should see it (no private path).
        folder: A folder that holds config.json and the tokenizer's files.
        gguf: The GGUF file that the model was read from, if it was.
        config: The transformers config.
        architecture: Its shape.
        tensors: Its weights.
        warnings: What a reader of the results must know of the source.
        changes: Digest of what was done to the shape or the weights since they were read; empty for nothing.
        source: The files that it is read from, as they were when it was opened; None where they do not matter.
    """

    name: str
    origin: str
    folder: Path
    gguf: Path | None
    config: PretrainedConfig
    architecture: Architecture
    tensors: TensorSource
    warnings: tuple[str, ...] = ()
    changes: str = ""
    source: SourceFiles | None = None

    def groups(self) -> list[WeightGroup]:
        """Return the matrices, in the order of the forward pass."""
        return self.architecture.groups()

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite.

        Raises:
            InputError: the tensor holds NaN or infinity.
        """
        return self.tensors.read(name)

    def noting(self, notes: Iterable[str]) -> "Model":
        """Return the model with more sentences that a reader of the results must know, each said once."""
        noted = replace(self, warnings=tuple(dict.fromkeys((*self.warnings, *notes))))
        # The files are not read again for what is the same.
        noted.__dict__.update({name: value for name, value in vars(self).items() if name == "digest"})
        return noted

    def own_config(self) -> PretrainedConfig:
        """Return a copy of the configuration, to be changed."""
        return type(self.config).from_dict(self.config.to_dict())

    def require_unchanged(self) -> None:
        """Refuse to go on where the source is no longer what was read, and what `digest` is of.

        Raises:
            InputError: see above.
        """
        if self.source is not None:
            self.source.require_unchanged()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over config.json, the tokenizer's files, the weights' files and changes: what a result depends on."""
        files = digest_files([*metadata_files(self.folder), *self.tensors.files])
        return hashlib.sha256(f"{files}:{self.changes}".encode()).hexdigest() if self.changes else files


def digest_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 over the names, sizes and contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
