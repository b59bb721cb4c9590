"""The layout of the external data of ONNX graphs for coding: the initialisers that a graph places in it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from exporter.coding.layout import FileSection, array_part
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError

# Limits of a graph without its weights. A layer takes 6 kB and 30 nodes; a byte may take 100 bytes when parsed.
MOST_GRAPH_BYTES = 4 << 20
MOST_NODES = 1 << 16


def layout_of(path: Path) -> list[FileSection] | None:
    """Return the initialisers in a file `NAME.onnx.data` next to `NAME.onnx`; None for another file.

    Raises:
        InputError: the graph cannot be read.
    """
    graph = path.with_suffix("")
    if graph.suffix != ".onnx" or not graph.is_file():
        return None
    with graph.open("rb") as file:
        model = read_graph(file.read(MOST_GRAPH_BYTES + 1), graph)
    held = [External.of(one, graph) for one in model.graph.initializer if one.dims]
    return [FileSection(one.start, array_part(one.shape, one.kind)) for one in held if one.location == path.name]


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
