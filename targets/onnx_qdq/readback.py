"""Decodes the artifact's tables with ONNX Runtime's `DequantizeLinear`, one at a time."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from exporter.formats.format import Float32
from exporter.formats.group import WeightGroup
from exporter.targets.onnx.graph import GATHER
from exporter.targets.onnx.readback import Tables


class QdqTables(Tables):
    """The matrices of an ONNX decoder in QDQ form, found by the nodes that use them."""

    def decode(self, group: WeightGroup) -> Float32:
        """Return a matrix as the runtime uses it, float32 [rows, columns]."""
        if self._in_floats(group):
            return super().decode(group)
        codes, scales, *zero_points = (self._values(name) for name in self._names(group))
        if group.role == "embedding":
            return dequantised(codes, scales[:, 0], 0)
        return np.ascontiguousarray(dequantised(codes, scales, 1, *zero_points).T)

    def format_name(self, group: WeightGroup) -> str:
        """Return the format of the initialisers, such as `int8-channel`."""
        if self._in_floats(group):
            return super().format_name(group)
        codes, scales, *_ = (self._initialisers[name] for name in self._names(group))
        kind = TensorProto.DataType.Name(codes.data_type).lower()
        channels = codes.dims[0 if group.role == "embedding" else 1]
        return f"{kind}-{'channel' if scales.dims[0] == channels else 'tensor'}"

    def _in_floats(self, group: WeightGroup) -> bool:
        """Return whether a matrix of a layer has no codes."""
        return group.layer is not None and f"{self._stem(group)}/weight" not in self._nodes

    def _names(self, group: WeightGroup) -> tuple[str, ...]:
        """Return the initialisers of codes, scales and perhaps zero points of the embedding or of a `MatMul`."""
        if group.role == "embedding":
            return self._first(GATHER).input[0], self._first(f"{GATHER}/scales").input[0]
        node, _ = self._node(group)
        weights = self._first(f"{node.name.removesuffix('/MatMul')}/weight")
        return tuple(weights.input)


def dequantised(codes: np.ndarray, scales: Float32, axis: int, zero_points: np.ndarray | None = None) -> Float32:
    """Return the output of ONNX Runtime's `DequantizeLinear` for codes with one scale per index of an axis."""
    parts = {"codes": codes, "scales": scales} | ({} if zero_points is None else {"zero_points": zero_points})
    node = helper.make_node("DequantizeLinear", [*parts], ["y"], axis=axis)
    graph = helper.make_graph(
        [node],
        "dequantise",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)],
        [numpy_helper.from_array(values, name) for name, values in parts.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    decoded: Float32 = session.run(None, {})[0]
    return decoded
