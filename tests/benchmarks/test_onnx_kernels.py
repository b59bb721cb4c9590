"""How quickly, and how exactly, ONNX Runtime multiplies with each `MatMulNBits` format on this machine's CPU.

Models of one node, each format alternating with int4-b32 at accuracy level 4. A ratio is int4-b32's least time over the
format's, so above 1 is quicker.

In the shapes of the reference model on one thread, by its own CPU time, which other work on the machine changes little.
The error is the output's, relative, against the decoded weights multiplied in float64: it shows what a level rounds,
and would show a wrong kernel.

With more weights than the caches hold, for one token on the machine's cores, as a model's matrices are read; by the
clock, so nothing else must run.
"""

import time
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.targets.onnx.matmulnbits import BITS, BLOCKS, MatMulNBitsFormat
from tests.benchmarks.measured import THREADS

# Outputs and inputs: query, gate or up, down, head.
LAYER, HEAD = ((576, 576), (1536, 576), (576, 1536)), (49152, 576)
# Some 70 MB in int4-b32.
BEYOND_THE_CACHES = ((196608, 576), (73728, 1536))
CASES = (*product(LAYER, (1, 256)), (HEAD, 1))
LEVELS = (4, 1, 0)
REPEATS, REPEATS_BY_THE_CLOCK = 9, 25
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


def session(kernel: Kernel, rows: int, columns: int, threads: int = 1) -> onnxruntime.InferenceSession:
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
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Timed:
    """A session with its input and output bound, so that little but the kernel is timed."""

    def __init__(self, kernel: Kernel, rows: int, columns: int, tokens: int, threads: int = 1) -> None:
        self._session = session(kernel, rows, columns, threads)
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self._binding = self._session.io_binding()
        x = np.random.default_rng(1).standard_normal((tokens, columns), np.float32)
        self._held = x, np.empty((tokens, rows), np.float32)
        for bind, name, array in zip((self._binding.bind_input, self._binding.bind_output), "xy", self._held):  # noqa: B905
            bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        self._runs = 1
        while self.seconds() * self._runs < LEAST_SECONDS:
            self._runs *= 2

    def seconds(self) -> float:
        started = self._clock()
        for _ in range(self._runs):
            self._session.run_with_iobinding(self._binding)
        return (self._clock() - started) / self._runs


def measured(kernel: Kernel, rows: int, columns: int, tokens: int, threads: int = 1) -> tuple[float, float]:
    """Return the baseline's least time over the kernel's, and the kernel's in seconds."""
    pair = [Timed(each, rows, columns, tokens, threads) for each in (BASELINE, kernel)]
    times = [[timed.seconds() for timed in pair] for _ in range(REPEATS if threads == 1 else REPEATS_BY_THE_CLOCK)]
    base, own = np.min(times, axis=0)
    return float(base / own), float(own)


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
        ratios = [measured(kernel, *shape, tokens)[0] for shape, tokens in CASES]
        print(f"{kernel.format.name:24}{wrong:12.1e}" + "".join(f"{ratio:18.2f}" for ratio in ratios), flush=True)
        parts.cache_clear()
        # Level 4 rounds activations to int8 in blocks; the others compute in float32.
        assert wrong < (0.02 if level == 4 else 1e-5)


def test_speed_of_one_token_beyond_the_caches() -> None:
    print(f"\none token, {THREADS} threads: ratio, and seconds for 1e12 products, for each of {BEYOND_THE_CACHES}")
    for bits, block, asymmetric in product(BITS, BLOCKS, (False, True)):
        kernel = Kernel(MatMulNBitsFormat(bits, block, asymmetric), 4)
        figures = []
        for rows, columns in BEYOND_THE_CACHES:
            ratio, seconds = measured(kernel, rows, columns, 1, THREADS)
            figures.append(f"{ratio:10.2f}{seconds / (rows * columns) * 1e12:8.1f}")
            parts.cache_clear()
        print(f"{kernel.format.name:24}" + "".join(figures), flush=True)
