"""Workloads: the facts that determine predicted speeds, and parsing of the names that runtimes and users write."""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from exporter.device.backend import BackendName
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError, did_you_mean

# The interface of a processor determines the bandwidth it reaches; on PC GPUs, interfaces differ less than drivers.
Kind = Literal["cpu", "metal", "opencl", "cuda", "gpu", "npu"]
Machine = Literal["phone", "apple", "x86", "board", "arm"]
# Formats by kernel: floats, 8 and 4 bits in blocks of one scale, K-quants of 4 bits and more, and all formats of fewer
# bits.
Family = Literal["float", "eight", "four", "k", "low"]

KINDS: dict[str, Kind] = {
    "cpu": "cpu", "gpu:metal": "metal", "gpu:opencl": "opencl", "gpu:cuda": "cuda", "gpu": "gpu", "npu": "npu",
}  # fmt: skip
ALIASES: dict[str, BackendName] = {
    "metal": "gpu:metal", "opencl": "gpu:opencl", "cuda": "gpu:cuda", "vulkan": "gpu:vulkan", "sycl": "gpu:sycl",
    "rocm": "gpu:rocm", "gpu:hip": "gpu:rocm", "htp": "npu:htp", "npu:htp0": "npu:htp", "npu:hexagon": "npu:htp",
    "npu:qnn": "npu:htp", "ane": "npu:ane", "npu:coreml": "npu:ane", "openvino": "npu:openvino", "rknn": "npu:rknn",
}  # fmt: skip

# Formats whose runtime computes one operation at a time, also on neural processors.
BY_OPERATION = r"(UD-)?(I?Q\d_|TQ\d_|MXFP4)"
# The first match is used. A suffix of a name (a group size, a mix's letter) does not change its kernels.
FORMATS: tuple[tuple[str, Family, str], ...] = (
    (r"(B?F16|F32|FP16|FP32)\b", "float", "F32, F16, BF16"),
    (r"(Q8_|(DYNAMIC_)?INT8\b|Q8\b|8-BIT|FP8|A(8|16)W8|W8A(8|16))", "eight", "Q8_0, int8, dynamic_int8, fp8, a8w8"),
    (r"(UD-)?(Q[456]_K|IQ4_)", "k", "Q4_K, Q5_K, Q6_K and their mixes (_S, _M, _L), IQ4_NL, IQ4_XS"),
    (r"(UD-)?(Q[23]_K|IQ[123]_|TQ[12]_|Q[123]_0|INT[23]\b)", "low", "Q2_K, Q3_K, IQ1_S to IQ3_M, TQ1_0, TQ2_0, int2"),
    (r"(Q[45]_[01]|(DYNAMIC_)?INT4(\b|_)|W4A(8|16)|A(8|16)W4|8DA4W|MXFP4|NVFP4|Q4F16|4-BIT|Q4\b|AWQ|GPTQ|SPINQUANT)",
     "four", "Q4_0, Q4_0_4_8, Q4_1, Q5_0, Q5_1, int4, w4a16, 8da4w, MXFP4"),
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A model's file on a processor.

    Attributes:
        backend: The processor and its interface.
        machine: The kind of machine.
        bandwidth_bytes_per_s: Peak bandwidth of the memory.
        cycles_per_s: Cycles per second of the CPU cores in use, together; zero if unknown.
        products_per_s: Multiply-adds per second of the CPU's best 4-bit kernels in prefill; zero if unknown.
        has_integer_dot: Whether the CPU multiplies bytes four at a time (dotprod, i8mm, VNNI, AVX2).
        format: Format of the weights.
        file_bytes: Bytes of the file read per token; all of them for a dense model.
        parameters: Weights of the model.
        context: Tokens in the cache while a token is generated.
        runtime: Name of the runtime; empty if unknown.
        peak_operations_per_s: Peak of a neural processor from its data sheet; zero if unknown.
        processor: Name of the processor, such as `Hexagon v73` or `Intel Arc`; empty if unknown.
        kv_bytes_per_token: Bytes of the float16 keys and values of one token; zero if unknown.
    """

    backend: str
    machine: Machine
    bandwidth_bytes_per_s: float
    cycles_per_s: float
    products_per_s: float
    has_integer_dot: bool
    format: str
    file_bytes: float
    parameters: float
    context: int = 64
    runtime: str = ""
    peak_operations_per_s: float = 0.0
    processor: str = ""
    kv_bytes_per_token: int = 0

    @property
    def kind(self) -> Kind:
        """The backend's kind, among those that differ in speed."""
        kind = KINDS.get(self.backend) or KINDS[self.backend.split(":")[0]]
        # Phone and PC GPUs differ more than their interfaces.
        return "opencl" if kind == "gpu" and self.machine in ("phone", "board") else kind

    @property
    def is_compiled(self) -> bool:
        """Whether a neural processor runs one compiled graph, instead of an operation at a time as llama.cpp's."""
        by_operation = "llama" in self.runtime.lower() or re.match(BY_OPERATION, self.format.upper())
        return self.kind == "npu" and not by_operation

    @property
    def is_intel(self) -> bool:
        """Whether the processor is one of Intel's GPUs."""
        return bool(re.match(r"Intel|Iris|Arc", self.processor))

    @property
    def is_early_apple_gpu(self) -> bool:
        """Whether the processor is a GPU before Apple's ninth family: M1, M2, A16 and before."""
        return bool(re.match(r"(Apple )?(M[12]|A1[0-6])\b", self.processor))

    @property
    def family(self) -> Family:
        """The format's family, among those whose kernels differ."""
        return format_family(self.format)


def backend_name(text: str) -> str:
    """Return the canonical name of a backend: one of the profiles', or `gpu` or `npu` if the text is no more specific.

    Raises:
        RequestError: the backend is unknown.
    """
    name = text.strip().lower()
    if name in ("gpu", "npu"):
        return name
    known = get_args(BackendName)
    name = ALIASES.get(name, ALIASES.get(name.split()[0] if name else "", cast(BackendName, name)))
    if name not in known:
        raise RequestError(f"unknown backend {shown(text)}", next_step=did_you_mean(text, [*known, "gpu", "npu"]))
    return name


def is_known_format(text: str) -> bool:
    """Return whether `format_family` knows a format."""
    return any(re.match(pattern, text.strip().upper()) for pattern, _, _ in FORMATS)


def format_family(text: str) -> Family:
    """Return the family of a format given by its runtime's name.

    Raises:
        RequestError: the format is unknown.
    """
    for pattern, family, _ in FORMATS:
        if re.match(pattern, text.strip().upper()):
            return family
    known = "; ".join(examples for _, _, examples in FORMATS)
    raise RequestError(f"unknown format {shown(text)}", next_step=f"known: {known}")
