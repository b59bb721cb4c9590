"""Turns the skeleton into the artifact: matrices become `MatMulNBits`, and data is written to the external file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.compress.compression import CompressedMatrix
from exporter.formats.format import Bytes, Float32
from exporter.model.decoder import Decoder
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat
from exporter.targets.onnx.supported import declared_by

DOMAIN = "com.microsoft"
PAGE_BYTES = 4096
ALIGNED_FROM_BYTES = 1 << 20
SMALL_ALIGNMENT_BYTES = 64
GATHER = "/model/embed_tokens/Gather"
FUSED_QKV, QKV = "attn/qkv_proj", ("attn/q_proj", "attn/k_proj", "attn/v_proj")
EMBEDDING_WEIGHT, EMBEDDING_CODES = "model.embed_tokens.weight", "model.embed_tokens.codes"


@dataclass(frozen=True)
class Product:
    """A matrix multiplication of the graph.

    Attributes:
        node: The node.
        groups: The weight groups whose rows it holds, in order.
        stems: What the name of each group's own node would begin with, such as `/model/layers.3/attn/q_proj`.
    """

    node: ir.Node
    groups: tuple[str, ...]
    stems: tuple[str, ...]

    @property
    def weight(self) -> str:
        """Name of the initialiser that holds its weights."""
        weight = self.node.inputs[1]
        assert weight is not None and weight.name
        return weight.name


def products(graph: ir.Graph, decoder: Decoder) -> list[Product]:
    """Return the matrix multiplications with weights, in the order of the graph."""
    held = _held_by_nodes(decoder)
    return [
        Product(node, tuple(held[node.name].values()), tuple(held[node.name]))
        for node in graph
        if node.op_type == "MatMul" and node.name in held
    ]


def _held_by_nodes(decoder: Decoder) -> dict[str | None, dict[str, str]]:
    """Return the name of every node that may multiply by matrices, such as `/model/layers.3/attn/qkv_proj/MatMul`.

    For each, it says stem -> weight group of these matrices, in order.
    """
    found: dict[str | None, dict[str, str]] = {"/lm_head/MatMul": {"/lm_head": decoder.head.name}}
    nodes = declared_by(decoder).nodes
    for block in decoder.blocks:
        layer = f"/model/layers.{block.layer}/"
        stems = {f"{layer}{nodes[role]}": linear.group.name for role, linear in block.linears.items()}
        found |= {f"{stem}/MatMul": {stem: name} for stem, name in stems.items()}
        fused = {stem: name for stem, name in stems.items() if stem.removeprefix(layer) in QKV}
        found[f"{layer}{FUSED_QKV}/MatMul"] = fused
    return found


def gathered(
    products: Iterable[Product], matrices: Iterable[CompressedMatrix]
) -> Iterator[tuple[Product | None, list[CompressedMatrix]]]:
    """Yield each product as soon as all of its matrices have come, and a matrix that is in none by itself."""
    places = {name: product for product in products for name in product.groups}
    waiting: dict[str, CompressedMatrix] = {}
    for matrix in matrices:
        product = places.get(matrix.name)
        waiting[matrix.name] = matrix
        if product is None:
            yield None, [waiting.pop(matrix.name)]
        elif all(name in waiting for name in product.groups):
            yield product, [waiting.pop(name) for name in product.groups]


class DataFile:
    """The external data of a model, written tensor by tensor."""

    def __init__(self, file: BinaryIO, name: str, folder: Path) -> None:
        self._file = file
        self._name = name
        self._folder = folder

    def append(self, name: str, values: NDArray[np.generic]) -> ir.ExternalTensor:
        """Write a tensor and return its reference; large ones start on a page so that they can be mapped."""
        alignment = PAGE_BYTES if values.nbytes >= ALIGNED_FROM_BYTES else SMALL_ALIGNMENT_BYTES
        self._file.write(b"\0" * (-self._file.tell() % alignment))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(values).data)
        return ir.ExternalTensor(
            self._name,
            offset,
            values.nbytes,
            ir.DataType.from_numpy(values.dtype),
            shape=ir.Shape(values.shape),
            name=name,
            base_dir=self._folder,
        )

    def append_int4(self, name: str, codes: NDArray[np.int8]) -> ir.ExternalTensor:
        """Write a tensor of 4 bits, two elements in a byte with the first in the lower half, as ONNX packs them."""
        flat = codes.reshape(-1).view(np.uint8) & 15
        flat = np.pad(flat, (0, flat.size % 2))
        stored = self.append(name, flat[::2] | flat[1::2] << 4)
        return ir.ExternalTensor(
            self._name,
            stored.offset,
            stored.length,
            ir.DataType.INT4,
            shape=ir.Shape(codes.shape),
            name=name,
            base_dir=self._folder,
        )


def put_matrix(
    graph: ir.Graph, product: Product, format: MatMulNBitsFormat, data: Bytes, file: DataFile, accuracy_level: int
) -> list[ir.Value]:
    """Replace a `MatMul` with a `MatMulNBits` that holds the encoded rows; return its codes, scales, zero points."""
    node = product.node
    weight = node.inputs[1]
    assert weight is not None and weight.name and weight.shape is not None
    columns, rows = (int(n) for n in weight.shape.dims if isinstance(n, int))
    stem = weight.name.removesuffix(".weight")
    table = put_table(graph, file, stem, format, data, columns)
    output = output_of(node)
    replacement = ir.node(
        "MatMulNBits",
        inputs=[node.inputs[0], *table],
        attributes={
            "K": columns,
            "N": rows,
            "bits": format.bits,
            "block_size": format.block_columns,
            "accuracy_level": accuracy_level,
        },
        domain=DOMAIN,
        outputs=[output],
        name=f"{node.name}NBits",
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], node.outputs, [output])
    del graph.initializers[weight.name]
    return table


def put_table(
    graph: ir.Graph, file: DataFile, stem: str, format: MatMulNBitsFormat, data: Bytes, columns: int
) -> list[ir.Value]:
    """Write codes, scales and zero points and return their values; scales are returned in float32."""
    codes, scales, zero_points = format.split(data, columns)
    parts: dict[str, NDArray[Any]] = {"codes": codes, "scales": scales}
    if zero_points is not None:
        parts["zero_points"] = zero_points
    values = []
    for part, array in parts.items():
        value = register(graph, file.append(f"{stem}.{part}", array))
        values.append(value if array.dtype != np.float16 else widened(graph, value))
    return values


def output_of(node: ir.Node) -> ir.Value:
    """Return a value that replaces a node's output when the node is replaced."""
    (output,) = node.outputs
    return ir.Value(name=output.name, shape=output.shape, type=output.type)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Make a tensor an initialiser and return its value."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def put_halves(graph: ir.Graph, file: DataFile, name: str, data: Bytes) -> ir.Value:
    """Write rows of float16, uint8 [rows, bytes], in the layout of a `MatMul`; return them widened to float32."""
    halves = np.ascontiguousarray(np.ascontiguousarray(data).view(np.float16).T)
    return widened(graph, register(graph, file.append(name, halves)))


def widened(graph: ir.Graph, halves: ir.Value) -> ir.Value:
    """Return float16 numbers behind a `Cast` to float32, which ONNX Runtime folds into a constant at load."""
    output = ir.Value(name=f"{halves.name}.float32", shape=halves.shape, type=ir.TensorType(ir.DataType.FLOAT))
    cast = ir.node("Cast", [halves], {"to": ir.DataType.FLOAT}, outputs=[output], name=f"{halves.name}/Cast")
    graph.insert_before(graph[0], cast)
    return output


def put_embedding(graph: ir.Graph, format: MatMulNBitsFormat, rows: int, columns: int, table: list[ir.Value]) -> None:
    """Gather the embedding from codes, scales and zero points, which a tied head shares.

    A head takes the codes in blocks, the lookup takes them in rows, so a tied table has two initialisers for the same
    bytes of the file.
    """
    gather = next(node for node in graph if node.name == GATHER)
    floats = gather.inputs[0]
    assert floats is not None and floats.name
    blocks, *scales = table
    if not blocks.uses():
        del graph.initializers[str(blocks.name)]
    codes = register(graph, _reshaped(blocks, EMBEDDING_CODES, [rows, columns * format.bits // 8]))
    output = output_of(gather)
    lookup = ir.node(
        "GatherBlockQuantized",
        inputs=[codes, gather.inputs[1], *scales],
        attributes={"bits": format.bits, "block_size": format.block_columns, "gather_axis": 0, "quantize_axis": 1},
        domain=DOMAIN,
        outputs=[output],
        name="/model/embed_tokens/GatherBlockQuantized",
    )
    ir.convenience.replace_nodes_and_values(graph, gather, [gather], [lookup], gather.outputs, [output])
    del graph.initializers[floats.name]


def _reshaped(value: ir.Value, name: str, shape: list[int]) -> ir.ExternalTensor:
    """Return the bytes of an initialiser as a tensor of another name and shape."""
    held = value.const_value
    assert isinstance(held, ir.ExternalTensor)
    return ir.ExternalTensor(
        held.location, held.offset, held.length, held.dtype, shape=ir.Shape(shape), name=name, base_dir=held.base_dir
    )


def put_floats(graph: ir.Graph, name: str, values: Float32, file: DataFile) -> None:
    """Give an initialiser its float32 values."""
    graph.initializers[name].const_value = file.append(name, values)


def move_rest(graph: ir.Graph, file: DataFile) -> None:
    """Write the float initialisers that the graph still holds: norms, biases, rotary tables.

    Shapes stay in the graph, where shape inference needs them; so do scalars.
    """
    for name, value in graph.initializers.items():
        held = value.const_value
        if held is None or held.dtype != ir.DataType.FLOAT or held.size == 1:
            continue
        if not isinstance(held, ir.ExternalTensor):
            value.const_value = file.append(name, held.numpy())
