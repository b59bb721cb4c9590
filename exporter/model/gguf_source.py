"""Opens a GGUF file as a model: config and tokenizer from its header, tensors under Hugging Face names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import PretrainedConfig

from exporter.formats.format import Bytes, Float32
from exporter.formats.integers import Integers
from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.errors import InputError
from exporter.model.decoder import HEAD, Decoder
from exporter.model.gguf_config import read_config, used_tensors
from exporter.model.gguf_file import GgufFile, grid_warning, open_whole, whole_name
from exporter.model.gguf_header import HF_FOLDER
from exporter.model.gguf_names import first_rows, gguf_names, gguf_shapes, in_source_order, row_order
from exporter.model.gguf_rope import same_yarn
from exporter.model.gguf_tokenizer import case_warning, unpack_tokenizer
from exporter.model.model import Model, SourceFiles, digest_files
from exporter.model.rotary import rope_parameters, rotary_kind
from exporter.model.tensors import require_finite

# Increment when the unpacked metadata changes.
METADATA_VERSION = 2
# Types whose blocks of 32 hold one scale, in float16, and whole multiples of it (`block_q4_0` in ggml-common.h).
INTEGERS = {"Q4_0": Integers(4, 32), "Q5_0": Integers(5, 32), "Q8_0": Integers(8, 32)}
LoadConfig = Callable[[Path], PretrainedConfig]


def open_gguf_model(path: Path, origin: str, name: str, load_config: LoadConfig) -> Model:
    """Open a GGUF file as a model; config and tokenizer are unpacked into the cache.

    Args:
        path: The file, or any part of a split one.
        origin: Human-readable origin.
        name: Short name of the model.
        load_config: Reads the config of a Hugging Face folder.

    Raises:
        InputError: the file is damaged, of an unsupported kind, or holds something that would be lost.
    """
    source = SourceFiles(lambda: [one for one in path.parent.glob("*.gguf") if whole_name(one) == whole_name(path)])
    file = open_whole(path)
    made = read_config(file)
    folder = _metadata_folder(file, made)
    config = load_config(folder)
    decoder = Decoder.of(config, file.path)
    _require_same_rope(file, config, decoder)
    needed = [group.name for group in decoder.groups()] + list(decoder.vectors())
    # A file may hold a separate head although the config ties it, or lack one although the config does not.
    names = used_tensors(file, gguf_names(decoder), [*needed, HEAD])
    decoder.check_shapes({name: file.shape(name) for name in names.values()}, gguf_shapes(decoder), file.path)
    tensors = GgufSource(file, names, decoder)
    warnings = grid_warning(file) + case_warning(file)
    return Model(name, origin, folder, file.path, config, decoder, tensors, warnings, source=source)


def _require_same_rope(file: GgufFile, config: PretrainedConfig, decoder: Decoder) -> None:
    if rotary_kind(config) == "yarn" and not same_yarn(config, decoder.head_dim):
        raise InputError(
            "llama.cpp and transformers compute other frequencies for this yarn scaling",
            where=file.path,
            got={key: value for key, value in rope_parameters(config).items() if value is not None},
            next_step=HF_FOLDER,
        )


def _metadata_folder(file: GgufFile, config: Mapping[str, Any]) -> Path:
    """Return a cached folder with the config and tokenizer of a GGUF file."""
    digest = digest_files(file.paths)[:32]
    kept = cache_folder("gguf") / f"{METADATA_VERSION}-{transformers.__version__}-{digest}"
    return kept_folder(kept, lambda folder: _unpack(file, config, folder))


def _unpack(file: GgufFile, config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, generation_config.json and the tokenizer into a folder."""
    _write(folder / "config.json", config)
    special = unpack_tokenizer(file, config["vocab_size"], folder)
    ends = special.get("eos_token_id", [])
    _write(folder / "config.json", {**config, **special, **({"eos_token_id": ends[0]} if ends else {})})
    _write(folder / "generation_config.json", special)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class GgufSource:
    """The tensors of a GGUF file under Hugging Face names, dequantised on reading.

    A matrix may be some rows of a tensor that holds several, or one of a stack.

    Args:
        file: The file; its tensors have the shapes of `gguf_shapes`.
        names: Hugging Face name -> GGUF name.
        decoder: Says which rows are a matrix's, which are in another order there, and which vectors hold another value.
    """

    def __init__(self, file: GgufFile, names: Mapping[str, str], decoder: Decoder) -> None:
        self.files = list(file.paths)
        self._file, self._names, self._shapes = file, names, decoder.tensors()
        self._orders = {
            group.name: order for group in decoder.groups() if (order := row_order(decoder, group)) is not None
        }
        self._first_rows = first_rows(decoder)
        self._offsets = {vector.name: vector.offset for vector in decoder.all_vectors() if vector.offset}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""
        return dict(self._shapes)

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite."""
        if name in self._first_rows:
            values = self._file.decoded_rows(self._names[name], self._rows(name))
            values = in_source_order(values, self._orders.get(name))
        else:
            values = self._file.decoded(self._names[name]).reshape(self._shapes[name])
        if name in self._offsets:
            values = values - np.float32(self._offsets[name])
        return require_finite(values if values.flags.writeable else values.copy(), name)

    def _rows(self, name: str) -> slice:
        """Return where the rows of a matrix are among those of its tensor."""
        first = self._first_rows[name]
        return slice(first, first + self._shapes[name][0])

    def stored_type(self, name: str) -> str | None:
        """Return the name of a matrix's type."""
        found: str = self._file.tensors[self._names[name]].tensor_type.name
        return found

    def integers(self, name: str) -> Integers | None:
        """Return the integers that a matrix consists of, if its type has one step for each block and no offset."""
        return INTEGERS.get(self.stored_type(name) or "")

    def codes(self, name: str) -> Bytes:
        """Return the encoded rows of a matrix, uint8 [rows, bytes], in the source's order of rows."""
        rows = np.ascontiguousarray(self._file.stored_rows(self._names[name])[self._rows(name)]).view(np.uint8)
        return in_source_order(rows, self._orders.get(name)).copy()

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix as float32, finite."""
        order = self._orders.get(name)
        stored = rows if order is None else np.argsort(order)[rows]
        return require_finite(self._file.decoded_rows(self._names[name], stored + self._first_rows[name]), name)
