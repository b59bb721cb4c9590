"""The compute backends of a device: processors and their interfaces, kernels, and measured runs."""

import re
from collections.abc import Iterable
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from exporter.device.neural import NeuralProcessor
from exporter.device.provenance import AppMemory, Bandwidth, Operations, Ratio, Seconds, Text, Watts
from exporter.foundation.config_files import impossible
from exporter.foundation.quantities import Basis, Document

ArmFeature = Literal["neon", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"]
X86Feature = Literal["avx", "avx2", "fma", "f16c", "avx-vnni", "avx512", "avx512-bf16", "avx512-vnni", "amx-int8"]
Feature = Literal[ArmFeature, X86Feature]
# Linux's names -> the profiles' names.
CPUINFO_NAMES = {
    "asimd": "neon", "asimddp": "dotprod", "avx512f": "avx512", "amx_int8": "amx-int8", "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16", "avx512_vnni": "avx512-vnni",
}  # fmt: skip
BackendName = Literal[
    "cpu", "gpu:cuda", "gpu:metal", "gpu:opencl", "gpu:rocm", "gpu:sycl", "gpu:vulkan", "npu:ane", "npu:htp",
    "npu:openvino", "npu:rknn", "npu:xdna",
]  # fmt: skip
Family = Literal["f32", "f16", "bf16", "q8", "q4", "k", "iq", "int8", "int4", "w4a16"]

VERSION_OF_HEXAGON = re.compile(r"v[0-9]{2}\b")
BITS_OF_A_PARAMETER = 0.5, 40.0
FormatName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,32}$")]
# From a weight in 10 microseconds to a thousand times what a server's processor multiplies.
WeightsPerSecond = Annotated[float, Field(ge=1e5, le=1e15)]


def features_named(words: Iterable[str]) -> frozenset[str]:
    """Return the features among words of /proc/cpuinfo, under the profiles' names."""
    return frozenset(CPUINFO_NAMES.get(word, word) for word in words) & frozenset[str](get_args(Feature))


class InstructionSet(Document):
    """The instruction-set features of one architecture that matter to the kernels of language models."""

    features: tuple[Feature, ...] = Field(strict=False, min_length=1)
    basis: Basis
    source: Text

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        features = set(self.features)
        if len(features) < len(self.features):
            raise impossible("a feature is listed twice", ", ".join(self.features), "each feature once")
        if features & set(get_args(ArmFeature)) and features & set(get_args(X86Feature)):
            raise impossible("no core has both Arm and x86 features", ", ".join(self.features), "one architecture")
        return self


class Kernel(Document):
    """The speed of a runtime's kernels for a family of formats.

    Attributes:
        family: `q4` and `q8` are llama.cpp's types of 32 weights (Q4_0, Q8_0, ...), `k` and `iq` its K and IQ types,
            `int4` and `int8` those of ONNX and other runtimes, `w4a16` that of a neural processor.
        repacked: Whether weights are repacked at load; absent if unknown.
        feature: The instructions that the kernel uses, such as `i8mm` or `sme`; absent if unknown.
        prefill_operations_per_s: 2 x parameters x tokens/s of a prompt of about 512 tokens.
        decode_ratio: Bytes/s read in decoding, as a ratio of the backend's usable bandwidth.
    """

    family: Family
    repacked: bool | None = None
    feature: Feature | None = None
    prefill_operations_per_s: Operations | None = None
    decode_ratio: Ratio | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.prefill_operations_per_s is None and self.decode_ratio is None:
            raise impossible("the kernel has no number", "none", "prefill_operations_per_s or decode_ratio")
        return self


class TimedKernel(Document):
    """The speed of a format's kernels on this device, timed by themselves.

    Attributes:
        bits: Stored bits of a weight.
        decode_weights_per_s: Weights multiplied per second with one token, read from memory.
        product_seconds: Added to each product with one token: its start, and rounding its input.
        prefill_weights_per_s: Weights x tokens multiplied per second with many tokens.
        spread: Half the range of the middle half of the times, over their median: the larger of both kinds.
    """

    bits: float = Field(ge=BITS_OF_A_PARAMETER[0], le=BITS_OF_A_PARAMETER[1])
    decode_weights_per_s: WeightsPerSecond
    product_seconds: float = Field(ge=0, le=0.1)
    prefill_weights_per_s: WeightsPerSecond
    spread: float = Field(ge=0, le=10)


class TimedKernels(Document):
    """The speeds of a target's kernels on this device.

    Attributes:
        target: The target.
        runtime: Its runtime, with the version that was timed.
        threads: CPU threads.
        basis: Always `measured`: an emulation's times are not the device's.
        speeds: Format -> its speed.
    """

    target: Annotated[str, Field(pattern="^[a-z0-9]+(-[a-z0-9]+)*$", max_length=32)]
    runtime: Text
    threads: int = Field(ge=1, le=256)
    basis: Literal["measured"]
    source: Text
    speeds: dict[FormatName, TimedKernel] = Field(min_length=1, max_length=64)


class Backend(Document):
    """A compute backend: `cpu`, or a GPU or neural processor through an interface.

    Attributes:
        name: The processor and the interface, such as `gpu:vulkan`.
        processor: Name of the processor, such as `Adreno 750`.
        cores: Number of cores (GPU cores, compute units, neural cores).
        peak_bandwidth_bytes_per_s: Given if it differs from that of the device's memory.
        usable_bandwidth_bytes_per_s: Bandwidth reached in decoding, apart from the fixed cost; required for the CPU.
        peak_operations_per_s: From its data sheet, in the precision that the source names.
        memory_limit_bytes: Addressable memory, if less than an app may use.
        fixed_seconds_per_token: Added to a token's bytes over the usable bandwidth; absent means none.
        decode_watts: Power of the whole device while decoding on this backend.
        kernels: Speeds of families of formats, as published.
        timed_kernels: Speeds of single formats, timed on this device; of the CPU only.
        npu: What a compiler for its neural processor needs; `npu:htp` only.
    """

    name: BackendName
    processor: Text | None = None
    cores: int | None = Field(default=None, ge=1, le=65536)
    peak_bandwidth_bytes_per_s: Bandwidth | None = None
    usable_bandwidth_bytes_per_s: Bandwidth | None = None
    peak_operations_per_s: Operations | None = None
    memory_limit_bytes: AppMemory | None = None
    fixed_seconds_per_token: Seconds | None = None
    decode_watts: Watts | None = None
    kernels: tuple[Kernel, ...] = Field(default=(), strict=False, max_length=64)
    timed_kernels: tuple[TimedKernels, ...] = Field(default=(), strict=False, max_length=8)
    npu: NeuralProcessor | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _has_its_own_processor(self) -> Self:
        if self.npu is None:
            return self
        if self.name != "npu:htp":
            raise impossible(f"{self.name} has no neural processor of {self.npu.vendor}", self.name, "npu:htp")
        named = VERSION_OF_HEXAGON.search(self.processor or "")
        if named is not None and named[0] != self.npu.architecture:
            raise impossible("npu.architecture contradicts processor", self.npu.architecture, named[0])
        self.npu.require_known()
        return self

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        kinds = [(kernel.family, kernel.repacked, kernel.feature) for kernel in self.kernels]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise impossible("a kernel is listed twice", kind[0], "each family, repacked and feature once")
        targets = [timed.target for timed in self.timed_kernels]
        if len(set(targets)) < len(targets):
            raise impossible("the kernels of a target are timed twice", ", ".join(targets), "each target once")
        if targets and self.name != "cpu":
            raise impossible("timed_kernels are not the CPU's", self.name, "timed_kernels of the backend cpu only")
        return self


class Measured(Document):
    """A timed run on this device.

    Attributes:
        backend: The backend.
        runtime: The runtime, with its version if known.
        model: The model.
        format: Format or mix of the weights, as named by the runtime.
        file_bytes: Size of the model's file.
        read_bytes: Bytes of it read per token, if fewer (experts, embeddings on flash).
        parameters: Weights of the model.
        decode_tokens_per_s: Decode speed.
        prefill_tokens_per_s: Prefill speed.
        prompt_tokens: Length of the prompt.
        context: Average number of tokens in the context while decoding.
        threads: CPU threads.
        peak_bytes: Peak memory of the process.
        basis: `measured` by this exporter, or `published` by others.
    """

    backend: BackendName
    runtime: Text | None = None
    model: Text | None = None
    format: Text
    file_bytes: int = Field(ge=1 << 20, le=1 << 42)
    read_bytes: int | None = Field(default=None, ge=1 << 20, le=1 << 42)
    parameters: int | None = Field(default=None, ge=1_000_000, le=10_000_000_000_000)
    decode_tokens_per_s: float | None = Field(default=None, ge=1e-4, le=1e5)
    prefill_tokens_per_s: float | None = Field(default=None, ge=1e-4, le=1e7)
    prompt_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    context: int | None = Field(default=None, ge=1, le=1 << 24)
    threads: int | None = Field(default=None, ge=1, le=256)
    peak_bytes: int | None = Field(default=None, ge=1 << 20, le=1 << 42)
    basis: Basis
    source: Text

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.decode_tokens_per_s is None and self.prefill_tokens_per_s is None:
            raise impossible("no speed was measured", "none", "decode_tokens_per_s or prefill_tokens_per_s")
        if self.read_bytes is not None and self.read_bytes > self.file_bytes:
            raise impossible("read_bytes exceeds file_bytes", f"{self.read_bytes:,}", f"at most {self.file_bytes:,}")
        low, high = BITS_OF_A_PARAMETER
        if self.parameters is not None and not low <= (bits := 8 * self.file_bytes / self.parameters) <= high:
            raise impossible(
                "file_bytes and parameters do not go together",
                f"{bits:.3g} bits a parameter",
                f"{low:g} to {high:g}",
                "give bytes, and parameters as a whole number",
            )
        return self

    @property
    def drawn_bytes_per_s(self) -> float:
        """Bytes/s read in decoding; zero if not measured."""
        return (self.read_bytes or self.file_bytes) * (self.decode_tokens_per_s or 0.0)
