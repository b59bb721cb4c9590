"""How quickly, and how exactly, ONNX Runtime multiplies with each `MatMulNBits` format on this machine's CPU.

Models of one node in the shapes of the reference model, each format alternating with int4-b32 at accuracy level 4, on
one thread and by its own CPU time, which other work on the machine changes little. A ratio is int4-b32's least time
over the format's, so above 1 is quicker. The error is the output's, relative, against the decoded weights multiplied in
float64: it shows what a level rounds, and would show a wrong kernel.
"""

import time
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.weights.matmulnbits import BITS, BLOCKS, MatMulNBitsFormat

# Outputs and inputs: query, gate or up, down, head.
LAYER, HEAD = ((576, 576), (1536, 576), (576, 1536)), (49152, 576)
CASES = (*product(LAYER, (1, 256)), (HEAD, 1))
LEVELS = (4, 1, 0)
REPEATS = 9
LEAST_SECONDS = 0.004


@dataclass(frozen=True)
class Kernel:
    """A format at an accuracy level."""

    format: MatMulNBitsFormat
    level: int


BASELINE = Kernel(MatMulNBitsFormat(4, 32), 4)


@cache
def parts(format: MatMulNBitsFormat, rows: int, columns: int) -> tuple[np.ndarray, ...]:
    """Return random codes, scales and zero points; rows are padded to whole blocks, as the operator allows."""
    chance, blocks = np.random.default_rng(0), -(-columns // format.block_columns)
    codes = chance.integers(0, 256, (rows, blocks, format.block_columns * format.bits // 8), np.uint8)
    scales = (chance.random((rows, blocks), np.float32) + 0.5) / (1 << format.bits)
    if not format.asymmetric:
        return codes, scales
    return codes, scales, chance.integers(0, 256, (rows, -(-blocks * format.bits // 8)), np.uint8)


def decoded(format: MatMulNBitsFormat, rows: int, columns: int) -> np.ndarray:
    codes, scales, *zero_points = parts(format, rows, columns)
    shifts = np.arange(0, 8, format.bits)
    mask, blocks = (1 << format.bits) - 1, scales.shape[1]
    values = (codes[..., None] >> shifts & mask).reshape(rows, blocks, format.block_columns)
    zero = 1 << (format.bits - 1)
    if zero_points:
        zero = (zero_points[0][..., None] >> shifts & mask).reshape(rows, -1)[:, :blocks, None].astype(np.float64)
    return ((values - zero) * scales[..., None].astype(np.float64)).reshape(rows, -1)[:, :columns]


def session(kernel: Kernel, rows: int, columns: int) -> onnxruntime.InferenceSession:
    names = ["codes", "scales", "zero_points"]
    held = [numpy_helper.from_array(part, name) for part, name in zip(parts(kernel.format, rows, columns), names)]  # noqa: B905
    node = helper.make_node(
        "MatMulNBits", ["x", *(tensor.name for tensor in held)], ["y"], domain="com.microsoft", K=columns, N=rows,
        bits=kernel.format.bits, block_size=kernel.format.block_columns, accuracy_level=kernel.level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", rows])],
        held,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Timed:
    """A session with its input and output bound, so that little but the kernel is timed."""

    def __init__(self, kernel: Kernel, rows: int, columns: int, tokens: int) -> None:
        self._session = session(kernel, rows, columns)
        self._binding = self._session.io_binding()
        x = np.random.default_rng(1).standard_normal((tokens, columns), np.float32)
        self._held = x, np.empty((tokens, rows), np.float32)
        for bind, name, array in zip((self._binding.bind_input, self._binding.bind_output), "xy", self._held):  # noqa: B905
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._runs = 1
        while self.seconds() * self._runs < LEAST_SECONDS:
            self._runs *= 2

    def seconds(self) -> float:
        started = time.thread_time()
        for _ in range(self._runs):
            self._session.run_with_iobinding(self._binding)
        return (time.thread_time() - started) / self._runs


def measured(kernel: Kernel, rows: int, columns: int, tokens: int) -> float:
    """Return the baseline's least time over the kernel's."""
    pair = [Timed(each, rows, columns, tokens) for each in (BASELINE, kernel)]
    times = [[timed.seconds() for timed in pair] for _ in range(REPEATS)]
    base, own = np.min(times, axis=0)
    return float(base / own)


def error(kernel: Kernel, rows: int, columns: int) -> float:
    x = np.random.default_rng(2).standard_normal((32, columns), np.float32)
    expected = x @ decoded(kernel.format, rows, columns).T
    got = session(kernel, rows, columns).run(None, {"x": x})[0]
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("level", LEVELS)
def test_speed_and_error_of_every_format(level: int) -> None:
    heads = "".join(f"{f'{rows}x{columns} M={tokens}':>18}" for (rows, columns), tokens in CASES)
    print(f"\naccuracy level {level}{'error':>20}{heads}")
    for bits, block, asymmetric in product(BITS, BLOCKS, (False, True)):
        kernel = Kernel(MatMulNBitsFormat(bits, block, asymmetric), level)
        wrong = max(error(kernel, *shape) for shape in LAYER)
        ratios = [measured(kernel, *shape, tokens) for shape, tokens in CASES]
        print(f"{kernel.format.name:24}{wrong:12.1e}" + "".join(f"{ratio:18.2f}" for ratio in ratios), flush=True)
        parts.cache_clear()
        # Level 4 rounds activations to int8 in blocks; the others compute in float32.
        assert wrong < (0.02 if level == 4 else 1e-5)
