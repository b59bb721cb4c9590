"""The outside oracle for MatMulNBits formats: ONNX Runtime's own operator, fed the identity in float32."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from exporter.errors import RequestError
from exporter.targets.onnx.readback import _identity_product
from exporter.weights.matmulnbits import MatMulNBitsFormat, matmulnbits_format, matmulnbits_formats


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


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(matmulnbits_formats())),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([0.0, 1e-35, 1e-6, 1.0, 1e6]),
)
def test_any_block_round_trips_finitely(name: str, seed: int, magnitude: float) -> None:
    format = matmulnbits_format(name)
    chance = np.random.default_rng(seed)
    weight = (chance.standard_normal((5, 256)) * magnitude).astype(np.float32)
    decoded = format.decode_rows(format.encode_rows(weight, chance.random(256).astype(np.float32)), 256)
    assert np.isfinite(decoded).all()
    # No code is further from its weight than the largest weight of the matrix: at worst everything becomes zero.
    assert np.abs(decoded - weight).max() <= np.abs(weight).max() * 1.01


def test_refuses_widths_that_are_no_whole_blocks() -> None:
    with pytest.raises(RequestError, match="int4-b64 cannot hold rows of 96 weights"):
        matmulnbits_format("int4-b64").encode_rows(np.zeros((2, 96), np.float32), None)
    with pytest.raises(RequestError, match="unknown MatMulNBits format 'int5-b32'"):
        matmulnbits_format("int5-b32")
