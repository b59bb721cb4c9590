"""Low-rank factors of a matrix: two small matrix multiplications, added to the matrix's own output."""

from collections.abc import Sequence

import onnx_ir as ir

from exporter.formats.format import Bytes, EncodedFactors, WeightFormat
from exporter.targets.onnx.graph import DOMAIN, DataFile, Product, put_halves, put_table
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat


def add_factors(
    graph: ir.Graph, product: Product, factors: Sequence[EncodedFactors], file: DataFile, accuracy_level: int
) -> None:
    """Add L (R x) to a matrix's output; for a fused matrix, concatenate the results of its groups.

    Args:
        graph: The graph; `put_matrix` has replaced the product in it.
        product: The multiplication before its replacement.
        factors: Factors of each group of the product.
        file: Receives the data.
        accuracy_level: Accuracy level of `MatMulNBits`.
    """
    base = next(node for node in graph if node.name == f"{product.node.name}NBits")
    given, own = base.inputs[0], base.outputs[0]
    assert given is not None
    columns = int(base.attributes["K"].as_int())
    nodes: list[ir.Node] = []
    parts = []
    for stem, some in zip(product.stems, factors, strict=True):
        low_rank = some.low_rank
        right = _product(graph, f"{stem}/right", given, low_rank.format, some.right, columns, file, accuracy_level)
        inner = right.outputs[0]
        left = _product(graph, f"{stem}/left", inner, low_rank.format, some.left, low_rank.rank, file, accuracy_level)
        nodes += right, left
        parts.append(left.outputs[0])
    if len(parts) > 1:
        nodes.append(ir.node("Concat", parts, {"axis": -1}, name=f"{base.name}/Concat"))
    total = ir.Value(name=f"{own.name}/sum", shape=own.shape, type=own.type)
    own.replace_all_uses_with(total)
    nodes.append(ir.node("Add", [own, nodes[-1].outputs[0]], outputs=[total], name=f"{base.name}/Add"))
    graph.insert_after(base, nodes)


def _product(
    graph: ir.Graph,
    stem: str,
    given: ir.Value,
    format: WeightFormat,
    data: Bytes,
    columns: int,
    file: DataFile,
    accuracy_level: int,
) -> ir.Node:
    """Return the multiplication by one factor: `MatMulNBits`, or `MatMul` with float16 weights widened at load."""
    name = stem.strip("/").replace("/", ".")
    if not isinstance(format, MatMulNBitsFormat):
        return ir.node("MatMul", [given, put_halves(graph, file, f"{name}.weight", data)], name=f"{stem}/MatMul")
    table = put_table(graph, file, name, format, data, columns)
    attributes = {
        "K": columns,
        "N": len(data),
        "bits": format.bits,
        "block_size": format.block_columns,
        "accuracy_level": accuracy_level,
    }
    return ir.node("MatMulNBits", [given, *table], attributes, domain=DOMAIN, name=f"{stem}/MatMulNBits")
