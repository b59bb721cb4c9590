"""Decodes the artifact's tables with ONNX Runtime's own operators, one at a time."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import tensor_dtype_to_np_dtype

from exporter.formats.format import Float32, plus
from exporter.formats.group import WeightGroup
from exporter.foundation.errors import InputError
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat

OUTPUTS_AT_ONCE = 2048


class Tables:
    """The matrices of an ONNX decoder, found by the nodes that use them.

    Args:
        path: The graph.
        nodes: Role -> path of a matrix's node within its layer.
    """

    def __init__(self, path: Path, nodes: Mapping[str, str]) -> None:
        self._folder, self._paths = path.parent, nodes
        try:
            self._graph = onnx.load_model(str(path), load_external_data=False).graph
        except Exception as error:
            raise InputError("the ONNX file is truncated or damaged", where=path, got=error) from error

    @cached_property
    def _nodes(self) -> dict[str, onnx.NodeProto]:
        return {node.name: node for node in self._graph.node}

    @cached_property
    def _makers(self) -> dict[str, onnx.NodeProto]:
        return {node.output[0]: node for node in self._graph.node if node.output}

    @cached_property
    def _initialisers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self._graph.initializer}

    def decode(self, group: WeightGroup) -> Float32:
        """Return a matrix as the runtime uses it, including its factors, float32 [rows, columns]."""
        base = self._decoded(*self._node(group), group.rows, group.columns)
        factors = self._factors(group)
        if factors is None:
            return base
        left, right = factors
        rank = self._outputs(right)
        return plus(base, self._decoded(left, 0, group.rows, rank), self._decoded(right, 0, rank, group.columns))

    def _factors(self, group: WeightGroup) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """Return the nodes that multiply by L and R, or None if the matrix has no factors."""
        if group.layer is None:
            return None
        sides = [
            [f"{self._stem(group)}/{side}/{kind}" for kind in ("MatMulNBits", "MatMul")] for side in ("left", "right")
        ]
        found = [self._nodes[name] for names in sides for name in names if name in self._nodes]
        return (found[0], found[1]) if len(found) == 2 else None

    def _decoded(self, node: onnx.NodeProto, first: int, rows: int, columns: int) -> Float32:
        """Return some rows of a node's matrix."""
        last = first + rows
        if node.op_type == "MatMul":
            return np.ascontiguousarray(self._values(self._stored(node.input[1])).T[first:last], np.float32)
        if node.op_type == "Gather":
            return self._values(node.input[0])
        tables = [self._values(name) for name in self._table_inputs(node)]
        decoded = np.empty((rows, columns), np.float32)
        for at in range(first, last, OUTPUTS_AT_ONCE):
            some = slice(at, min(at + OUTPUTS_AT_ONCE, last))
            decoded[some.start - first : some.stop - first] = _identity_product(node, [table[some] for table in tables])
        return decoded

    def format_name(self, group: WeightGroup) -> str:
        """Return the format that the graph states, such as `int4-b32` or `int4-b32+r32-F16`."""
        base = self._format_of(self._node(group)[0])
        factors = self._factors(group)
        if factors is None:
            return base
        return f"{base}+r{self._outputs(factors[1])}-{self._format_of(factors[0])}"

    def _format_of(self, node: onnx.NodeProto) -> str:
        if node.op_type == "Gather":
            return "F32"
        if node.op_type == "MatMul":
            kind = self._initialisers[self._stored(node.input[1])].data_type
            return "F16" if kind == TensorProto.FLOAT16 else "F32"
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        table = self._table_inputs(node)
        scale_type = tensor_dtype_to_np_dtype(self._initialisers[table[1]].data_type).type
        format = MatMulNBitsFormat(attributes["bits"], attributes["block_size"], len(table) == 3, scale_type)
        return format.name

    def _node(self, group: WeightGroup) -> tuple[onnx.NodeProto, int]:
        """Return the node that uses a matrix and the matrix's first row in it."""
        if group.role == "embedding" and "head" not in group.uses:
            return self._first("/model/embed_tokens/GatherBlockQuantized", "/model/embed_tokens/Gather"), 0
        if group.layer is None:
            return self._first("/lm_head/MatMulNBits", "/lm_head/MatMul"), 0
        stem = self._stem(group)
        own = [f"{stem}/MatMul{suffix}" for suffix in ("NBits", "")]
        if any(name in self._nodes for name in own):
            return self._first(*own), 0
        fused = f"{stem.rpartition('/')[0]}/qkv_proj"
        node = self._first(f"{fused}/MatMulNBits", f"{fused}/MatMul")
        return node, self._first_row(node, group)

    def _stem(self, group: WeightGroup) -> str:
        """Return the common prefix of a matrix's node names."""
        return f"/model/layers.{group.layer}/{self._paths[group.role]}"

    def _first(self, *names: str) -> onnx.NodeProto:
        for name in names:
            if name in self._nodes:
                return self._nodes[name]
        raise InputError("the graph lacks a node", where=self._folder, expected=" or ".join(names))

    def _first_row(self, node: onnx.NodeProto, group: WeightGroup) -> int:
        """Return the first row of query, key or value in a fused matrix, whose order is query, key, value."""
        if group.role == "q":
            return 0
        return self._outputs(node) - (2 if group.role == "k" else 1) * group.rows

    def _outputs(self, node: onnx.NodeProto) -> int:
        dims = self._initialisers[self._stored(node.input[1])].dims
        return int(dims[1] if node.op_type == "MatMul" else dims[0])

    def _stored(self, name: str) -> str:
        """Return the name of a stored initialiser, which a `Cast` may widen."""
        return name if name in self._initialisers else self._makers[name].input[0]

    def _table_inputs(self, node: onnx.NodeProto) -> list[str]:
        """Return the names of codes, scales and zero points as stored."""
        used = [*node.input[1:]] if node.op_type == "MatMulNBits" else [node.input[0], *node.input[2:]]
        return [self._stored(name) for name in used]

    def _values(self, name: str) -> np.ndarray:
        tensor = self._initialisers[name]
        try:
            return numpy_helper.to_array(tensor, str(self._folder))
        except (ValueError, OSError) as error:
            raise InputError("the external data is truncated or missing", where=name, got=error) from error


def _identity_product(node: onnx.NodeProto, tables: list[np.ndarray]) -> Float32:
    """Multiply the identity by a table in a model with one float32 multiplication; return [rows, columns].

    Float16 scales go through the runtime's own `Cast`, as in the artifact.
    """
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    block, bits = attributes["block_size"], attributes["bits"]
    codes = tables[0]
    rows = len(codes)
    columns = codes.size // rows * 8 // bits
    codes = codes.reshape(rows, columns // block, -1)
    names = ["codes", "scales", "zero_points"][: len(tables)]
    flat = [codes, *(table.reshape(-1) for table in tables[1:])]
    widened = helper.make_node("Cast", ["scales"], ["float_scales"], to=TensorProto.FLOAT)
    product = helper.make_node(
        "MatMulNBits", ["x", "codes", "float_scales", *names[2:]], ["y"], domain="com.microsoft", K=columns, N=rows,
        bits=bits, block_size=block, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [widened, product],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, rows])],
        [numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in zip(names, flat, strict=True)],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0]
    return result.T
