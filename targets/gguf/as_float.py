"""Rewrites a GGUF file in float32 with all its keys and tensors, as a reference for llama.cpp's computation."""

import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType

from exporter.model.gguf_file import GgufFile
from exporter.targets.gguf.header import finish_header
from exporter.targets.gguf.vocabulary import copy_fields

BLOCK = re.compile(r"blk\.(\d+)\.")
# Keys that the new file does not need, or sets itself.
LEFT_OUT = ("GGUF.", "split.", "general.architecture", "general.file_type", "general.alignment")


def write_as_float(file: GgufFile, path: Path, layers: Sequence[int] | None = None) -> None:
    """Decode every tensor with gguf's library and write it in float32, together with all keys of the file.

    Args:
        file: The file.
        path: Receives the new file, which is not split.
        layers: The layers to write, which are renumbered from 0; None for all.
    """
    names = _names(file, layers)
    architecture = file.value("general.architecture")
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        own = [field for name, field in file.fields.items() if not name.startswith(LEFT_OUT)]
        counts = f"{architecture}.block_count"
        count = file.value(counts)
        copy_fields(writer, [_cut(field, layers, count) for field in own if layers is None or field.name != counts])
        if layers is not None:
            writer.add_block_count(len(layers))
        for name, new in names.items():
            shape = file.shape(name)
            writer.add_tensor_info(new, shape, np.dtype(np.float32), 4 * file.tensors[name].n_elements)
        finish_header(writer)
        for name in names:
            writer.write_tensor_data(file.decoded(name))


def _names(file: GgufFile, layers: Sequence[int] | None) -> dict[str, str]:
    """Return the name of each kept tensor -> its new name."""
    if layers is None:
        return {name: name for name in file.tensors}
    places = {layer: place for place, layer in enumerate(layers)}
    names = {}
    for name in file.tensors:
        found = BLOCK.match(name)
        if found is None:
            names[name] = name
        elif int(found[1]) in places:
            names[name] = f"blk.{places[int(found[1])]}.{name[found.end() :]}"
    return names


def _cut(field: gguf.ReaderField, layers: Sequence[int] | None, count: object) -> gguf.ReaderField:
    """Return a field; if it holds a number for each of `count` layers, only those of the layers written."""
    of_numbers = field.types[0] == GGUFValueType.ARRAY and field.types[-1] != GGUFValueType.STRING
    if layers is None or not of_numbers or field.name.startswith("tokenizer."):
        return field
    values = field.parts[field.data[0]]
    return field if len(values) != count else field._replace(parts=[values[list(layers)]], data=[0])
