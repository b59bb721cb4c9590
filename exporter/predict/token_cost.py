"""The time of a token as a sum of terms: reading the weights, a fixed part, and work per weight.

A generated token reads every weight and the cache once (Williams et al. 2009, the roofline's slope). Published speeds
show two further parts: one that grows slowly with the model (successive launches, layer by layer), and one per weight
(unpacking, on processors that do not hide it behind the reading). Each term is a number of milliseconds computed from
the facts, scaled by the coefficients that apply:

    time = sum over terms of milliseconds x exp(sum of weight x coefficient)

The coefficients are fitted to published speeds; see `exporter.predict.coefficients`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log

from exporter.predict.workload import Workload

# Runtimes, by a word in their name, whose speed is known to differ from that of llama.cpp's own program.
RUNTIMES = (
    "cactus",
    "executorch",
    "geniex",
    "qualcomm genie",
    "llama.rn",
    "mlc",
    "mnn",
    "ollama",
    "qnn context",
    "termux",
    "vllm",
)
# Formats below 4 bits are bound by unpacking, so they are no faster than formats of this many bits. Kernels that look
# codes up in a table (IQ1 to IQ3) do half as many multiply-adds per second as those of Q2_K and Q4_0
# (`exporter.targets.gguf.kernel_speeds`).
LEAST_BITS, LEAST_BITS_OF_TABLES = 6.5, 9.0
# Bytes of one token in the float16 cache of a model of 10^9 parameters; they grow with the square root of the
# parameters. Llama 3.2 1B has 32 KiB, 8B has 128 KiB and Qwen3 0.6B has 112 KiB.
KV_BYTES_OF_A_BILLION = 56 * 1024
# Heads that share a key, in most models of today.
QUERIES_OF_A_KEY = 4
# The bandwidth at which the coefficients of its logarithm have no effect.
MIDDLE_BANDWIDTH = 60e9
# Before coefficients: operations of a GPU per byte of its memory bandwidth, and operations per second of a neural
# processor. A small neural processor reaches the share of its data sheet that published ones did (Hexagon: 8 to 18 of
# 45 to 100 TOPS).
GPU_OPERATIONS_PER_BYTE, NPU_OPERATIONS, NPU_SHARE = 24.0, 10e12, 0.2
# A Hexagon v73 reads no quicker from the 135 GB/s of a Snapdragon X Elite (52 GB/s) than from the 76.8 GB/s of a
# QCS9075 (47 GB/s): slopes of w4a16 of 1 to 8 x 10^9 weights, qualcomm/ai-hub-models perf.yaml.
HEXAGON_V73_BYTES_PER_S = 76.8e9
# llama.cpp's kernels on Hexagon unpack Q4_0 at 37 to 52 GB/s, whatever the memory gives (85 to 152 GB/s), at a
# context of 512 tokens: qualcomm/ai-hub-models perf.yaml.
UNPACKED_BYTES_PER_S = 50e9


@dataclass(frozen=True)
class Term:
    """A term of the time: `milliseconds` x exp(sum of weight x coefficient)."""

    milliseconds: float
    weights: Mapping[str, float]


def kv_bytes(parameters: float, context: int) -> float:
    """Return the bytes of the cache, estimated from the size of the model."""
    return float(KV_BYTES_OF_A_BILLION * (parameters / 1e9) ** 0.5 * context)


def decode_terms(work: Workload) -> list[Term]:
    """Return the terms of the time of one generated token."""
    kind, family, billions = work.kind, work.family, log(work.parameters / 1e9)
    bandwidth = log(_bandwidth(work) / MIDDLE_BANDWIDTH)
    side = kind if kind in ("cpu", "npu") else "gpu"
    reading = {"reading": 1.0, f"reading {kind}": 1.0, f"reading {family}": 1.0, f"bandwidth {side}": bandwidth}
    cached = {"cache": 1.0, f"cache {kind}": 1.0}
    fixed = {"fixed": 1.0, f"fixed {kind}": 1.0, "fixed size": billions}
    working = {"working": 1.0, f"working {kind}": 1.0}
    if kind == "cpu":
        reading[f"reading cpu {work.machine}"] = 1.0
        fixed["fixed cpu bandwidth"] = bandwidth
        if not work.has_integer_dot:
            reading["reading cpu without dot"] = 1.0
        if work.machine == "phone":
            working["working cpu phone"] = 1.0
    if kind == "metal" and family in ("k", "low") and work.is_early_apple_gpu:
        reading |= {"reading metal k": 1.0, "bandwidth metal k": bandwidth}
    if kind == "opencl" and family in ("k", "low"):
        reading[f"reading opencl {family}"] = 1.0
    if kind == "npu":
        if not work.is_compiled:
            reading["reading npu by operations"] = 1.0
            cached["cache npu by operations"] = 1.0
        reading[f"reading npu {work.machine}"] = 1.0
        if work.backend != "npu:htp":
            reading[f"reading {work.backend}"] = fixed[f"fixed {work.backend}"] = 1.0
        if work.processor == "Hexagon v73":
            reading["reading hexagon v73"] = 1.0
            fixed["fixed hexagon v73"] = 1.0
    if kind == "gpu" and work.is_intel:
        reading["reading intel"] = 1.0
        if work.backend == "gpu:vulkan":
            reading["reading intel vulkan"] = 1.0
    terms = [
        Term(1e3 * weight_bytes(work) / _bandwidth(work), reading),
        Term(_cache_milliseconds(work), cached),
        Term(1.0, fixed),
        Term(_working_milliseconds(work), working),
    ]
    return [Term(term.milliseconds, {**term.weights, **_runtime(work)}) for term in terms]


def _cache_milliseconds(work: Workload) -> float:
    """Return the time of attention over the cache: on a CPU it is bound by multiplying, elsewhere by reading."""
    known = work.kv_bytes_per_token * work.context
    size = known or kv_bytes(work.parameters, work.context)
    if work.kind == "cpu" and work.cycles_per_s:
        return 1e3 * QUERIES_OF_A_KEY * size / 2 / work.cycles_per_s
    return 1e3 * size / _bandwidth(work)


def _working_milliseconds(work: Workload) -> float:
    """Return the time of a multiply-add for each weight: ten per cycle of a CPU, or elsewhere 10^12 per second."""
    rate = 10 * work.cycles_per_s if work.kind == "cpu" and work.cycles_per_s else 1e12
    return 1e3 * work.parameters / rate


def _bandwidth(work: Workload) -> float:
    """Return the bandwidth of the memory, as far as the processor's own way to it goes."""
    ways = [work.bandwidth_bytes_per_s]
    if work.processor == "Hexagon v73":
        ways.append(HEXAGON_V73_BYTES_PER_S)
    if work.kind == "npu" and not work.is_compiled:
        ways.append(UNPACKED_BYTES_PER_S)
    return min(ways)


def weight_bytes(work: Workload) -> float:
    """Return the bytes of weights that one token reads, or those that take as long as unpacking them."""
    bits = LEAST_BITS_OF_TABLES if work.format.upper().startswith("IQ") else LEAST_BITS
    least = bits / 8 * work.parameters if work.family == "low" and work.kind != "metal" else 0.0
    return max(work.file_bytes, least)


def prefill_terms(work: Workload) -> list[Term]:
    """Return the time of one token of a prompt of about 512 tokens, as a single term."""
    kind, family = work.kind, work.family
    bandwidth = log(work.bandwidth_bytes_per_s / MIDDLE_BANDWIDTH)
    operations = 2 * work.parameters
    weights = {f"prompt {kind}": 1.0, f"prompt {'cpu' if kind == 'cpu' else 'gpu'} {family}": 1.0}
    if kind == "cpu":
        rate = 2 * work.products_per_s
        weights[f"prompt cpu {work.machine}"] = 1.0
    elif kind == "npu":
        rate = min(NPU_OPERATIONS, NPU_SHARE * work.peak_operations_per_s or NPU_OPERATIONS)
        weights["prompt npu size"] = log(work.parameters / 1e9)
        if work.backend != "npu:htp":
            weights[f"prompt {work.backend}"] = 1.0
        elif not work.is_compiled:
            weights["prompt npu by operations"] = 1.0
        if work.processor == "Hexagon v73":
            weights["prompt hexagon v73"] = 1.0
    else:
        rate = GPU_OPERATIONS_PER_BYTE * work.bandwidth_bytes_per_s
        weights["prompt gpu bandwidth"] = bandwidth
        if work.is_intel and work.backend == "gpu:vulkan":
            weights["prompt intel vulkan"] = 1.0
    if kind == "opencl" and family == "low":
        weights["prompt opencl low"] = 1.0
    named = {name.replace("runtime", "prompt runtime"): weight for name, weight in _runtime(work).items()}
    return [Term(1e3 * operations / rate, weights | named)]


@cache
def _words(runtime: str) -> tuple[str, ...]:
    # GenieX runs llama.cpp, too.
    name = runtime.lower()
    name = name.replace("genie", "") if "llama" in name else name
    return tuple(word for word in RUNTIMES if word in name)


def program_of(work: Workload) -> tuple[str, ...]:
    """Return the words of `RUNTIMES` in a runtime's name; none for llama.cpp, and where it is unknown."""
    return _words(work.runtime)


def _runtime(work: Workload) -> dict[str, float]:
    return {f"runtime {word}": 1.0 for word in program_of(work)}
