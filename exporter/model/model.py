"""The pipeline's model: decoder, lazy tensors, and a folder with config and tokenizer."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

from exporter.formats.format import Bytes, Float32, WeightFormat
from exporter.formats.group import WeightGroup
from exporter.formats.integers import HoldsIntegers
from exporter.foundation.cache_entries import Identity, identity
from exporter.foundation.errors import InputError
from exporter.model.decoder import Decoder
from exporter.model.tensors import INDEX, HoldsCodes, HoldsFactors, TensorSource

# All files besides the weights that a transformers tokenizer or this package may read.
METADATA = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "tokenizer.model.*", "*.tiktoken",
    "*.tokenizer", "merges.txt", "vocab.txt", "dict.txt",
)  # fmt: skip


class SourceFiles:
    """A snapshot of the state of the files that a model is read from.

    Args:
        find: Returns the files.
    """

    def __init__(self, find: Callable[[], Iterable[Path]]) -> None:
        self._find = find
        self._found = self._look()

    def _look(self) -> dict[Path, Identity]:
        return {path: _state(path) for path in self._find()}

    def require_unchanged(self) -> None:
        """Check that no file was changed, added or removed since the snapshot.

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
        # A dangling link; reading it reports the error.
        return ()


def _changed(where: object) -> InputError:
    return InputError(
        "the source changed while it was read, so nothing is written", where=where,
        next_step="run it again when nothing writes there",
    )  # fmt: skip


def metadata_files(folder: Path) -> list[Path]:
    """Return the config and tokenizer files of a folder."""
    found = {path for pattern in METADATA for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name != INDEX and path.is_file())


@dataclass(frozen=True)
class Model:
    """A decoder with lazy weights.

    Attributes:
        name: Short name for files and titles.
        origin: Human-readable origin for the report (no private path).
        folder: A folder that holds config.json and the tokenizer's files.
        single_file: The file that the model was read from, tokenizer included; None for a folder.
        config: The transformers config.
        decoder: Its sizes and blocks.
        tensors: Its weights.
        warnings: Warnings about the source for the report.
        changes: Digest of the changes to shape or weights since reading; empty for none.
        licences: Files that state the terms it is under.
        source: Snapshot of its source files from when it was opened; None if they do not matter.
        base: The base of an adapter that is kept beside it, with the adapter's factors; this model is both merged. None
            for any other model.
    """

    name: str
    origin: str
    folder: Path
    single_file: Path | None
    config: PretrainedConfig
    decoder: Decoder
    tensors: TensorSource
    warnings: tuple[str, ...] = ()
    changes: str = ""
    licences: tuple[Path, ...] = ()
    source: SourceFiles | None = None
    base: "Model | None" = None

    def groups(self) -> list[WeightGroup]:
        """Return the matrices in the order of the forward pass."""
        return self.decoder.groups()

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite.

        Raises:
            InputError: the tensor holds NaN or infinity.
        """
        return self.tensors.read(name)

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite.

        Raises:
            InputError: they hold NaN or infinity.
        """
        return self.tensors.read_rows(name, rows)

    def looked_up(self, tokens: NDArray[np.int64]) -> list[Float32]:
        """Return the rows of each table of the decoder for ascending tokens, float32 [tokens, columns].

        Raises:
            InputError: they hold NaN or infinity.
        """
        found: dict[str, list[Float32]] = {}
        for part in self.decoder.tables:
            rows = tokens_of(part, tokens)
            if len(rows):
                found.setdefault(part.role, []).append(self.read_rows(part.name, rows))
        return [np.concatenate(parts) for parts in found.values()]

    def read_stored(self, name: str) -> Float32:
        """Return one tensor of `Decoder.stored_tensors` as float32, finite: in it, several matrices may be stacked.

        Raises:
            InputError: the tensor holds NaN or infinity.
        """
        parts = self.decoder.stored_matrices.get(name, ())
        return np.concatenate([self.read(part.name) for part in parts]) if len(parts) > 1 else self.read(name)

    def stored_type(self, name: str) -> str | None:
        """Return the name of the format in which the source holds a matrix; None for a checkpoint of floats."""
        return self.tensors.stored_type(name) if isinstance(self.tensors, HoldsCodes) else None

    def has_codes(self, name: str, format: WeightFormat) -> bool:
        """Say whether a format holds the codes that the source has of a matrix: they are of it, or integers."""
        if not isinstance(self.tensors, HoldsCodes):
            return False
        integers = self.tensors.integers(name)
        whole = isinstance(format, HoldsIntegers) and integers is not None and format.holds(integers)
        return whole or self.tensors.stored_type(name) == format.name

    def codes(self, name: str, format: WeightFormat) -> Bytes | None:
        """Return the rows of a matrix in a format, uint8 [rows, bytes], if that loses nothing.

        They are those of the source if it holds the very format, and else whole multiples of a step.
        """
        if isinstance(self.tensors, HoldsCodes) and self.tensors.stored_type(name) == format.name:
            return self.tensors.codes(name)
        return format.exact_rows(self.read(name)) if isinstance(format, HoldsIntegers) else None

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of the factors of each matrix that an adapter is kept beside, by its name."""
        return self.tensors.ranks() if isinstance(self.tensors, HoldsFactors) else {}

    def factors(self, name: str) -> tuple[Float32, Float32]:
        """Return L, float32 [rows, rank], and R, float32 [rank, columns], of a matrix of `ranks`."""
        assert isinstance(self.tensors, HoldsFactors)
        return self.tensors.factors(name)

    def noting(self, notes: Iterable[str]) -> "Model":
        """Return the model with more warnings, without duplicates."""
        noted = replace(self, warnings=tuple(dict.fromkeys((*self.warnings, *notes))))
        # Keep the cached digest: computing it reads all files.
        noted.__dict__.update({name: value for name, value in vars(self).items() if name == "digest"})
        return noted

    def own_config(self) -> PretrainedConfig:
        """Return a modifiable copy of the configuration."""
        return type(self.config).from_dict(self.config.to_dict())

    def require_unchanged(self) -> None:
        """Check that the source files, and so `digest`, are unchanged since the model was opened.

        Raises:
            InputError: they changed.
        """
        if self.source is not None:
            self.source.require_unchanged()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything a result depends on: config.json, tokenizer files, weight files and changes."""
        files = digest_files([*metadata_files(self.folder), *self.tensors.files])
        return hashlib.sha256(f"{files}:{self.changes}".encode()).hexdigest() if self.changes else files


def tokens_of(part: WeightGroup, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of a part of a table for those of some tokens that it holds."""
    rows = tokens - part.first_row
    return rows[(rows >= 0) & (rows < part.rows)]


def digest_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 over the names, sizes and contents of files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            total.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
