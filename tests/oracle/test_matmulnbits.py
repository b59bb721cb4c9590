"""The outside oracle for MatMulNBits formats: ONNX Runtime's own operator, fed the identity in float32."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.foundation.errors import RequestError
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat, matmulnbits_format, matmulnbits_formats
from exporter.targets.onnx.readback import _identity_product


def decoded_by_runtime(format: MatMulNBitsFormat, data: np.ndarray, columns: int) -> np.ndarray:
    node: onnx.NodeProto = helper.make_node("MatMulNBits", [], [], block_size=format.block_columns, bits=format.bits)
    return _identity_product(node, [part for part in format.split(data, columns) if part is not None])


@pytest.mark.parametrize("name", list(matmulnbits_formats()))
def test_decodes_as_the_runtime_does_and_a_flipped_nibble_is_seen(name: str) -> None:
    weight, format = np.random.default_rng(0).standard_normal((24, 512)).astype(np.float32), matmulnbits_format(name)
    data = format.encode_rows(weight, None)
    assert data.nbytes == format.stored_bytes(24, 512)
    planned = format.decode_rows(data, 512)
    np.testing.assert_array_equal(decoded_by_runtime(format, data, 512), planned)
    damaged = data.copy()
    damaged[3, 17] ^= 0x10
    assert not np.array_equal(decoded_by_runtime(format, damaged, 512), planned)


def looked_up(format: MatMulNBitsFormat, data: np.ndarray, columns: int) -> np.ndarray:
    """Return all rows as `GatherBlockQuantized` gives them."""
    codes, scales, *zero_points = (part for part in format.split(data, columns) if part is not None)
    parts = {"codes": codes.reshape(len(data), -1), "scales": scales.astype(np.float32)}
    if zero_points:
        parts["zero_points"] = zero_points[0]
    names = list(parts)
    node = helper.make_node(
        "GatherBlockQuantized", ["codes", "rows", *names[1:]], ["y"], domain="com.microsoft", bits=format.bits,
        block_size=format.block_columns, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "lookup",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, [len(data)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(data), columns])],
        [numpy_helper.from_array(np.ascontiguousarray(part), name) for name, part in parts.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {"rows": np.arange(len(data))})[0]


@pytest.mark.parametrize("name", list(matmulnbits_formats()))
def test_an_embedding_is_looked_up_as_planned_and_a_flipped_nibble_is_seen(name: str) -> None:
    weight, format = np.random.default_rng(0).standard_normal((24, 512)).astype(np.float32), matmulnbits_format(name)
    data = format.encode_rows(weight, None)
    planned = format.decode_rows(data, 512)
    np.testing.assert_array_equal(looked_up(format, data, 512), planned)
    damaged = data.copy()
    damaged[3, 17] ^= 0x10
    assert not np.array_equal(looked_up(format, damaged, 512), planned)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(matmulnbits_formats())),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([0.0, 1e-35, 1e-10, 1e-7, 1e-6, 1e-3, 1.0, 1e4, 1e9]),
)
def test_any_block_round_trips_finitely_or_is_refused(name: str, seed: int, magnitude: float) -> None:
    format = matmulnbits_format(name)
    chance = np.random.default_rng(seed)
    weight = (chance.standard_normal((5, 256)) * magnitude).astype(np.float32)
    importance = chance.random(256).astype(np.float32)
    if magnitude == 1e9 and format.scale_type is np.float16:
        with pytest.raises(RequestError, match=f"{name} cannot hold weights so large; .* choose {name}-f32"):
            format.encode_rows(weight, importance)
        return
    decoded = format.decode_rows(format.encode_rows(weight, importance), 256)
    assert np.isfinite(decoded).all()
    # No code is further from its weight than the largest weight of the matrix: at worst everything becomes zero.
    assert np.abs(decoded - weight).max() <= np.abs(weight).max() * 1.01


@pytest.mark.parametrize("name", [name for name in matmulnbits_formats() if not name.endswith("-f32")])
def test_float16_scales_cost_no_more_than_their_rounding(name: str) -> None:
    weight = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32) * np.float32(0.05)
    half, whole = matmulnbits_format(name), matmulnbits_format(f"{name}-f32")
    errors = [
        float(((format.decode_rows(format.encode_rows(weight, None), 512) - weight) ** 2).sum())
        for format in (half, whole)
    ]
    assert errors[0] <= 1.002 * errors[1]
    assert half.stored_bytes(64, 512) == whole.stored_bytes(64, 512) - 2 * 64 * 512 // half.block_columns


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", ["", "-asymmetric"])
def test_weights_whose_scales_are_the_last_steps_of_float16_keep_their_size(bits: int, asymmetric: str) -> None:
    format = matmulnbits_format(f"int{bits}-b32{asymmetric}")
    weight = np.full((3, 32), 6e-8, np.float32)
    weight[:, ::2] = -6e-8
    decoded = format.decode_rows(format.encode_rows(weight, None), 32)
    np.testing.assert_allclose(decoded, weight, rtol=0.01)


def test_refuses_widths_that_are_no_whole_blocks() -> None:
    with pytest.raises(RequestError, match="int4-b64 cannot hold rows of 96 weights"):
        matmulnbits_format("int4-b64").encode_rows(np.zeros((2, 96), np.float32), None)
    with pytest.raises(RequestError, match="unknown MatMulNBits format 'int5-b32'"):
        matmulnbits_format("int5-b32")
