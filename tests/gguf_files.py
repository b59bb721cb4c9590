"""GGUF files that the tests make: lowered from a small model, edited, or split."""

import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from gguf import GGUFValueType

from exporter.compress.compression import Compression
from exporter.model.sources import open_model
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.gguf.vocabulary import copy_fields


def lowered(source: Path, folder: Path, target: str, type: str) -> Artifact:
    """Lower a model to the nearest of a type."""
    folder.mkdir()
    made = load_target(target)
    with open_model(str(source)) as model:
        return lower(made, Compression(model, made.decide(model, type, "rtn")), type, folder).artifact


def float_gguf(source: Path, path: Path) -> Path:
    """Lower a model to a GGUF file in F32."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        return lowered(source, Path(scratch, "made"), "gguf", "F32").weights[0].replace(path)


def edited_gguf(
    source: Path,
    path: Path,
    keys: Mapping[str, object] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Path:
    """Write a GGUF file anew with other keys and tensors: a value of None leaves a key out."""
    reader = gguf.GGUFReader(source)
    names = [name for name in reader.fields if not name.startswith("GGUF.") and name != "general.architecture"]
    with closing(gguf.GGUFWriter(path, str(keys.get("general.architecture", _architecture(reader))))) as writer:
        copy_fields(writer, (reader.fields[name] for name in names if name not in keys))
        for name, value in keys.items():
            if value is not None and name != "general.architecture":
                _add_key(writer, name, value)
        held = {tensor.name: tensor for tensor in reader.tensors}
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        for name, tensor in held.items():
            if name not in tensors:
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def split_gguf(source: Path, folder: Path, parts: int) -> list[Path]:
    """Write a GGUF file in several parts, as llama.cpp splits one: the keys stand in the first."""
    reader = gguf.GGUFReader(source)
    names = [name for name in reader.fields if not name.startswith("GGUF.") and name != "general.architecture"]
    paths = [folder / f"model-{part + 1:05d}-of-{parts:05d}.gguf" for part in range(parts)]
    for part, path in enumerate(paths):
        with closing(gguf.GGUFWriter(path, _architecture(reader))) as writer:
            if part == 0:
                copy_fields(writer, (reader.fields[name] for name in names))
            writer.add_uint16("split.no", part)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(reader.tensors))
            for tensor in reader.tensors[part::parts]:
                writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    return paths


def _architecture(reader: gguf.GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _add_key(writer: gguf.GGUFWriter, name: str, value: object) -> None:
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    if isinstance(value, list):
        inner = kinds.get(type(value[0]), GGUFValueType.STRING)
        writer.add_key_value(name, value, GGUFValueType.ARRAY, inner)
    else:
        writer.add_key_value(name, value, kinds.get(type(value), GGUFValueType.STRING))
