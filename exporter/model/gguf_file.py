"""The keys and tensors of a GGUF file, which may be split into several files."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.model.gguf_reader import open_gguf

# Name of a file split by llama.cpp: name, part number, number of parts.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
PARTS_MOST = 1024
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufFile:
    """The keys of the first part and the tensors of all parts.

    Attributes:
        paths: The parts in order; one path if the file is not split.
        fields: Keys and their values.
        tensors: Tensors by name.
    """

    paths: tuple[Path, ...]
    fields: Mapping[str, gguf.ReaderField]
    tensors: Mapping[str, gguf.ReaderTensor]

    @property
    def path(self) -> Path:
        """The first part, the path to pass to llama.cpp."""
        return self.paths[0]

    def value(self, key: str) -> Any:
        """Return a key's value, or None if the file does not have it.

        Raises:
            InputError: a text is not valid UTF-8.
        """
        field = self.fields.get(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise InputError("a text in the GGUF file is not UTF-8", where=f"{self.path}: {key}", got=error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, rows first."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def decoded(self, name: str) -> Float32:
        """Return a tensor decoded by the gguf library, as float32 of its shape."""
        tensor = self.tensors[name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return values.reshape(self.shape(name))

    def stored_rows(self, name: str) -> NDArray[Any]:
        """Return the rows of a matrix, or of matrices that are stacked, as the file holds them: [rows, ...]."""
        data: NDArray[Any] = self.tensors[name].data
        return data.reshape(-1, data.shape[-1])

    def decoded_rows(self, name: str, rows: slice | NDArray[np.int64]) -> Float32:
        """Return some of `stored_rows` decoded by the gguf library, as float32."""
        stored = self.stored_rows(name)[rows]
        return gguf.dequantize(stored, self.tensors[name].tensor_type).astype(np.float32, copy=False)


def whole_name(path: Path) -> str:
    """Return a file's name without its suffix and part number."""
    part = PART.fullmatch(path.name)
    return part[1] if part else path.stem


def open_whole(path: Path) -> GgufFile:
    """Open a GGUF file by memory map, including all its parts if it is split.

    Raises:
        InputError: a part is missing, damaged or belongs to another file, or a tensor's type cannot be decoded.
    """
    readers = dict(_parts(path))
    tensors: dict[str, gguf.ReaderTensor] = {}
    for part, reader in readers.items():
        if reader.byte_order != "I":
            raise InputError("the GGUF file is of the other byte order", where=part, next_step="convert the model anew")
        twice = sorted(tensors.keys() & {tensor.name for tensor in reader.tensors})
        if twice:
            raise InputError(f"two parts hold the tensor {twice[0]}", where=part, next_step="fetch all parts again")
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    first = next(iter(readers.values()))
    whole = GgufFile(tuple(readers), first.fields, tensors)
    expected = whole.value("split.tensors.count")
    if len(readers) > 1 and expected is not None and expected != len(tensors):
        raise InputError(
            "the parts of the GGUF file do not belong together", where=whole.path, got=f"{len(tensors)} tensors",
            expected=expected, next_step="fetch all parts again",
        )  # fmt: skip
    _require_decodable(whole)
    return whole


def _parts(path: Path) -> Iterator[tuple[Path, gguf.GGUFReader]]:
    """Yield all parts in order, given any one of them."""
    given = open_gguf(path)
    count = _whole_number(given, "split.count", path, default=1)
    if count <= 1:
        yield path, given
        return
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count or count > PARTS_MOST:
        raise InputError(
            "the file is a part of a split GGUF file, but its name does not say which", where=path,
            expected=f"a name that ends in -00001-of-{count:05d}.gguf, and at most {PARTS_MOST} parts",
            next_step="give the parts the names that they were published under",
        )  # fmt: skip
    for number in range(count):
        part = path.with_name(f"{named[1]}-{number + 1:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise InputError(
                f"part {number + 1} of {count} of the GGUF file is missing", where=part,
                next_step="put all parts into one folder",
            )  # fmt: skip
        reader = given if part == path else open_gguf(part)
        stated = _whole_number(reader, "split.no", part), _whole_number(reader, "split.count", part)
        if stated != (number, count):
            raise InputError(
                "the part of a split GGUF file is not the one that its name says", where=part,
                got=f"part {stated[0] + 1} of {stated[1]}", expected=f"part {number + 1} of {count}",
                next_step="give the parts the names that they were published under",
            )  # fmt: skip
        yield part, reader


def _whole_number(reader: gguf.GGUFReader, key: str, where: Path, default: int | None = None) -> int:
    field = reader.get_field(key)
    value = default if field is None else field.contents() if field.types[0] != GGUFValueType.ARRAY else None
    if not isinstance(value, int):
        raise InputError(f"the GGUF file has no usable {key!r}", where=where, got=value, expected="a whole number")
    return value


def _require_decodable(file: GgufFile) -> None:
    """Reject tensor types that the gguf library cannot decode."""
    kinds = {tensor.tensor_type: name for name, tensor in file.tensors.items()}
    for kind, name in kinds.items():
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise InputError(
                f"tensors of type {kind.name} cannot be read", where=f"{file.path}: {name}",
                next_step="give the model in another type, best in F16 or BF16",
            ) from error  # fmt: skip


def grid_warning(file: GgufFile) -> tuple[str, ...]:
    """Return a warning if the source's weights are already quantised."""
    types = sorted({tensor.tensor_type.name for tensor in file.tensors.values()} - set(FLOAT_TYPES))
    if not types:
        return ()
    return (
        f"the source is already quantised ({', '.join(types)}): its weights lie on a coarse grid, "
        "so formats of as many bits look lossless against it and the original's own loss is not seen",
    )
