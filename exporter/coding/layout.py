"""The layout of a runtime's file for coding: which bytes are codes and which are numbers.

A part of a file is an array [rows, records] of records of equal size. A record is a sequence of fields, such as the
float16 scale and the 32 codes of a Q8_0 block. Bytes of one kind are similar, so each field is coded separately. A
wrong layout costs bytes, never correctness.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
from google.protobuf.message import DecodeError

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.gguf_reader import open_gguf

# Kinds of fields: bytes that are codes of weights; little-endian floating-point numbers; anything else.
CODES, NUMBERS, ANYTHING = range(3)
KINDS = (CODES, NUMBERS, ANYTHING)
# Limits of an ONNX graph without its weights. A layer takes 6 kB and 30 nodes; a byte may take 100 bytes when parsed.
MOST_GRAPH_BYTES = 4 << 20
MOST_NODES = 1 << 16


@dataclass(frozen=True)
class Field:
    """A field of a record: its kind and its width in bytes."""

    kind: int
    width: int


@dataclass(frozen=True)
class Part:
    """An array of records.

    Attributes:
        rows: Rows of a matrix; neighbouring records of a row are similar.
        records: Records per row.
        fields: Fields of a record.
    """

    rows: int
    records: int
    fields: tuple[Field, ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(field.width for field in self.fields)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.records * self.record_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class FileSection:
    """A part and its start in the file."""

    start: int
    part: Part


_HALF, _FLOAT = Field(NUMBERS, 2), Field(NUMBERS, 4)


def _codes(*widths: int) -> tuple[Field, ...]:
    return tuple(Field(CODES, width) for width in widths)


# Blocks of ggml's types (ggml-common.h): float16 scales, nested scales, and codes of one or several widths.
_BLOCKS: dict[str, tuple[Field, ...]] = {
    "F32": (_FLOAT,),
    "F16": (_HALF,),
    "BF16": (_HALF,),
    "Q4_0": (_HALF, *_codes(16)),
    "Q4_1": (_HALF, _HALF, *_codes(16)),
    "Q5_0": (_HALF, *_codes(4, 16)),
    "Q5_1": (_HALF, _HALF, *_codes(4, 16)),
    "Q8_0": (_HALF, *_codes(32)),
    "Q2_K": (*_codes(16, 64), _HALF, _HALF),
    "Q3_K": (*_codes(32, 64, 12), _HALF),
    "Q4_K": (_HALF, _HALF, *_codes(12, 128)),
    "Q5_K": (_HALF, _HALF, *_codes(12, 32, 128)),
    "Q6_K": (*_codes(128, 64, 16), _HALF),
    "IQ4_NL": (_HALF, *_codes(16)),
    "IQ4_XS": (_HALF, *_codes(2, 4, 128)),
}


def layout_of(path: Path) -> list[FileSection]:
    """Return the known sections of a file: the tensors of a GGUF file, or of the ONNX graph whose data it holds.

    Args:
        path: A `.gguf` file, `NAME.onnx.data` next to `NAME.onnx`, or any other file, which has no known sections.

    Raises:
        InputError: the GGUF file or the ONNX graph cannot be read.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _gguf_layout(path)
    graph = path.with_suffix("")
    if graph.suffix == ".onnx" and graph.is_file():
        return _onnx_layout(graph, path)
    return []


def _gguf_layout(path: Path) -> list[FileSection]:
    return [
        FileSection(int(tensor.data_offset), _ggml_part(tensor.tensor_type, [int(n) for n in tensor.shape]))
        for tensor in open_gguf(path).tensors
    ]


def _ggml_part(type: gguf.GGMLQuantizationType, shape: Sequence[int]) -> Part:
    """Return the part for a tensor; ggml's shapes begin with the columns."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    fields = _BLOCKS.get(type.name, (Field(CODES, size),))
    assert sum(field.width for field in fields) == size
    return Part(int(np.prod(shape[1:], dtype=np.int64)), shape[0] // block, fields)


def _onnx_layout(graph: Path, data: Path) -> list[FileSection]:
    with graph.open("rb") as file:
        model = read_graph(file.read(MOST_GRAPH_BYTES + 1), graph)
    held = [External.of(one, graph) for one in model.graph.initializer if one.dims]
    return [FileSection(one.start, array_part(one.shape, one.kind)) for one in held if one.location == data.name]


def read_graph(data: bytes, where: Path) -> onnx.ModelProto:
    """Return an ONNX model whose weights are in external data.

    Raises:
        InputError: it is damaged or too large.
    """
    expected = f"at most {MOST_GRAPH_BYTES:,} bytes without its weights, {MOST_NODES:,} nodes and initialisers"
    if len(data) > MOST_GRAPH_BYTES:
        raise InputError("the ONNX graph is too large", where=where, got=f"{len(data):,} bytes", expected=expected)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise InputError("the ONNX file is truncated or damaged", where=where, got=error) from error
    count = len(model.graph.node) + len(model.graph.initializer)
    if count > MOST_NODES:
        raise InputError("the ONNX graph is too large", where=where, got=f"{count:,} nodes", expected=expected)
    # The library returns text that is not UTF-8 as bytes.
    strange = next((name for name in _texts(model.graph) if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError("the ONNX file is truncated or damaged", where=where, got=f"the name {shown(strange)}")
    return model


def _texts(graph: onnx.GraphProto) -> Iterator[object]:
    for node in graph.node:
        yield from (node.name, node.op_type, *node.input, *node.output)
    for tensor in graph.initializer:
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))
    yield from (value.name for values in (graph.input, graph.output, graph.value_info) for value in values)


@dataclass(frozen=True)
class External:
    """The location of the values of an initialiser of an ONNX graph.

    Attributes:
        location: The file next to the graph; empty if the values are in the graph.
        start: Offset of its first byte in the file.
        size: Number of bytes; follows from the shape if not stated.
        shape: Its dimensions.
        kind: Type of its values.
    """

    location: str
    start: int
    size: int
    shape: tuple[int, ...]
    kind: np.dtype[Any]

    @classmethod
    def of(cls, tensor: onnx.TensorProto, where: Path) -> "External":
        """Read the location from the graph.

        Raises:
            InputError: the initialiser has an unknown type or impossible numbers.
        """
        said = {entry.key: entry.value for entry in tensor.external_data}
        shape = tuple(tensor.dims)
        try:
            kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
            size = math.prod(shape) * kind.itemsize
            start, size = int(said.get("offset", 0)), int(said.get("length", size))
        except (ValueError, KeyError) as error:
            raise _strange_tensor(tensor, where, error) from error
        if min(start, size, *shape) < 0 or start + size >= 1 << 63:
            raise _strange_tensor(tensor, where, f"shape {shown(list(shape))} at the bytes {shown(start)}")
        return cls(said.get("location", ""), start, size, shape, kind)


def _strange_tensor(tensor: onnx.TensorProto, where: Path, what: object) -> InputError:
    return InputError(
        f"the initialiser {shown(tensor.name)} of the ONNX graph cannot be", where=where, got=what,
        next_step="fetch the graph again",
    )  # fmt: skip


def array_part(shape: Sequence[int], kind: np.dtype[Any]) -> Part:
    """Return the part for an array; one-byte integers are codes."""
    field = Field(NUMBERS if kind.kind == "f" else CODES if kind.itemsize == 1 else ANYTHING, kind.itemsize)
    return Part(int(shape[0]), int(np.prod(shape[1:], dtype=np.int64)), (field,))


def parts_of(sections: Sequence[FileSection], size: int, most: int) -> Iterator[Part]:
    """Yield parts that cover a file without gaps.

    Args:
        sections: The known sections of the file; a section that overlaps another or lies outside is ignored.
        size: Bytes of the file.
        most: Maximum bytes of a part.
    """
    at = 0
    for section in sorted((one for one in sections if one.part.bytes), key=lambda one: one.start):
        if section.start < at or section.start + section.part.bytes > size:
            continue
        yield from _anything(section.start - at, most)
        yield from split(section.part, most)
        at = section.start + section.part.bytes
    yield from _anything(size - at, most)


def _anything(count: int, most: int) -> Iterator[Part]:
    for first in range(0, count, most):
        yield Part(1, min(most, count - first), (Field(ANYTHING, 1),))


def split(part: Part, most: int) -> Iterator[Part]:
    """Yield a part in pieces of whole rows; if one row is too long, in pieces without structure."""
    rows = most // part.row_bytes
    if not rows:
        yield from _anything(part.bytes, most)
        return
    for first in range(0, part.rows, rows):
        yield replace(part, rows=min(rows, part.rows - first))
