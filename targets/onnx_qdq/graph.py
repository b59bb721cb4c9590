"""Turns the skeleton into the artifact: adds quantisers with static scales around every matrix multiplication."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter.calibrate.ranges import ChannelRanges
from exporter.formats.format import Bytes
from exporter.foundation.fitted import fitted_value
from exporter.targets.onnx.graph import GATHER, DataFile, Product, output_of, put_halves, register
from exporter.targets.onnx_qdq.per_channel import ChannelFormat

HEADROOM = fitted_value("exporter.targets.onnx_qdq", "headroom")


def parameters(codes: type[np.unsignedinteger], ranges: ChannelRanges) -> tuple[np.float32, np.unsignedinteger]:
    """Return scale and zero point of a range in codes of a type; zero is a code (Jacob et al. 2018, section 2.1).

    16-bit codes get headroom beyond the observed range, since other text exceeds it.
    """
    most = int(np.iinfo(codes).max)
    room = HEADROOM if codes is np.uint16 else 1.0
    low, high = room * min(float(ranges.low.min()), 0.0), room * max(float(ranges.high.max()), 0.0)
    scale = (high - low) / most or 1.0
    return np.float32(scale), codes(round(-low / scale))


@dataclass(frozen=True)
class Quantiser:
    """A scale and a zero point as values of a graph."""

    scale: ir.Value
    zero_point: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph, name: str, codes: type[np.unsignedinteger], ranges: ChannelRanges) -> "Quantiser":
        """Add the parameters of a tensor to the graph."""
        scale, zero_point = parameters(codes, ranges)
        made = (("scale", np.array(scale)), ("zero_point", np.array(zero_point)))
        return cls(*(register(graph, ir.tensor(value, name=f"{name}/{part}")) for part, value in made))

    def around(self, value: ir.Value, name: str, output: ir.Value | None = None) -> list[ir.Node]:
        """Return two nodes that quantise and dequantise a value; the second writes `output` if that is given."""
        parameters = [self.scale, self.zero_point]
        down = ir.node("QuantizeLinear", [value, *parameters], name=f"{name}/QuantizeLinear")
        up = ir.node(
            "DequantizeLinear",
            [down.outputs[0], *parameters],
            outputs=None if output is None else [output],
            name=f"{name}/DequantizeLinear",
        )
        return [down, up]


@dataclass(frozen=True)
class Table:
    """An integer matrix in the graph.

    Attributes:
        codes: int8 or int4 [columns, rows] for a `MatMul`, [rows, columns] for an embedding.
        scales: float32 [rows] for a `MatMul`, [rows, 1] for an embedding.
        zero_points: int4 [rows], all zero; None for int8. ONNX takes them for zero where they are absent, but QNN then
            reads int4 codes as if they were shifted, and gives noise without an error.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None = None

    def turned(self, graph: ir.Graph, head: ir.Node) -> "Table":
        """Return an embedding's table in the layout of a tied head, by nodes that run when the model is loaded.

        If the head used the initialisers directly, it would share them with the embedding, and ONNX Runtime does not
        fuse shared weights.
        """
        codes = ir.node("Transpose", [self.codes], {"perm": [1, 0]}, name="/lm_head/codes")
        scales = ir.node("Squeeze", [self.scales], name="/lm_head/scales")
        graph.insert_before(head, [codes, scales])
        return Table(codes.outputs[0], scales.outputs[0])


def put_weights(graph: ir.Graph, file: DataFile, stem: str, format: ChannelFormat, data: Bytes) -> Table:
    """Write the weights of a `MatMul` in the layout that it uses."""
    codes, scales = format.split(data)
    stored = register(graph, file.append(f"{stem}.scales", scales))
    if format.bits == 8:
        return Table(register(graph, file.append(f"{stem}.codes", codes.T)), stored)
    zero_points = file.append_int4(f"{stem}.zero_points", np.zeros(len(scales), np.int8))
    return Table(
        register(graph, file.append_int4(f"{stem}.codes", np.ascontiguousarray(codes.T))),
        stored,
        register(graph, zero_points),
    )


def put_product(graph: ir.Graph, product: Product, table: Table, given: Quantiser, made: Quantiser) -> None:
    """Put quantisers around a `MatMul` and its weights behind a `DequantizeLinear`.

    Each `MatMul` has its own quantisers, so that it is one unit for a runtime. Quantisers that round the same tensor
    alike are merged at load.
    """
    node = product.node
    inputs, weight = node.inputs
    assert inputs is not None and weight is not None and weight.name and node.name
    stem = node.name.removesuffix("/MatMul")
    before = given.around(inputs, f"{stem}/input")
    parts = [table.codes, table.scales, *([] if table.zero_points is None else [table.zero_points])]
    weights = ir.node("DequantizeLinear", parts, {"axis": 1}, name=f"{stem}/weight")
    replaced = ir.node("MatMul", [before[-1].outputs[0], weights.outputs[0]], name=node.name)
    output = output_of(node)
    after = made.around(replaced.outputs[0], f"{stem}/output", output)
    nodes = [*before, weights, replaced, *after]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [output])
    del graph.initializers[weight.name]


def put_float_product(graph: ir.Graph, product: Product, file: DataFile, data: Bytes) -> None:
    """Give a `MatMul` its weights in float16, which are widened at load, and leave its activations as they are."""
    node = product.node
    weight = node.inputs[1]
    assert weight is not None and weight.name and node.name
    name = f"{node.name.strip('/').replace('/', '.').removesuffix('.MatMul')}.weight"
    del graph.initializers[weight.name]
    node.replace_input_with(1, put_halves(graph, file, name, data))


def put_embedding(graph: ir.Graph, file: DataFile, format: ChannelFormat, data: Bytes) -> Table:
    """Look up each token's row of codes and its scale, and multiply them; return the table."""
    gather = next(node for node in graph if node.name == GATHER)
    floats, tokens = gather.inputs
    assert floats is not None and floats.name
    codes, scales = format.split(data)
    table = Table(
        register(graph, file.append("model.embed_tokens.codes", codes)),
        register(graph, file.append("model.embed_tokens.scales", scales[:, None])),
    )
    looked_up = ir.node("Gather", [table.codes, tokens], name=GATHER)
    scale = ir.node("Gather", [table.scales, tokens], name=f"{GATHER}/scales")
    output = output_of(gather)
    floated = ir.node(
        "DequantizeLinear",
        [looked_up.outputs[0], scale.outputs[0]],
        {"axis": -1, "block_size": format.block_columns},
        name=f"{GATHER}/DequantizeLinear",
        outputs=[output],
    )
    ir.convenience.replace_nodes_and_values(
        graph, gather, [gather], [looked_up, scale, floated], gather.outputs, [output]
    )
    del graph.initializers[floats.name]
    return table
