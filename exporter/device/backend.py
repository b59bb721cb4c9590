"""What computes on a device: its processors as runtimes reach them, their kernels, and what was measured on them."""

from collections.abc import Iterable
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from exporter.device.provenance import AppMemory, Bandwidth, Operations, Ratio, Seconds, Text, Watts
from exporter.foundation.config_files import impossible
from exporter.foundation.quantities import Basis, Document

ArmFeature = Literal["neon", "dotprod", "i8mm", "bf16", "sve", "sve2", "sme", "sme2"]
X86Feature = Literal["avx", "avx2", "fma", "f16c", "avx-vnni", "avx512", "avx512-bf16", "avx512-vnni", "amx-int8"]
Feature = Literal[ArmFeature, X86Feature]
# Linux's names of what profiles name otherwise.
CPUINFO_NAMES = {
    "asimd": "neon", "asimddp": "dotprod", "avx512f": "avx512", "amx_int8": "amx-int8", "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16", "avx512_vnni": "avx512-vnni",
}  # fmt: skip
BackendName = Literal[
    "cpu", "gpu:cuda", "gpu:metal", "gpu:opencl", "gpu:rocm", "gpu:sycl", "gpu:vulkan", "npu:ane", "npu:htp",
    "npu:openvino", "npu:rknn", "npu:xdna",
]  # fmt: skip
Family = Literal["f32", "f16", "bf16", "q8", "q4", "k", "iq", "int8", "int4", "w4a16"]

BITS_OF_A_PARAMETER = 0.5, 40.0


def features_named(words: Iterable[str]) -> frozenset[str]:
    """Return the instructions that words of /proc/cpuinfo name, by the profiles' names."""
    return frozenset(CPUINFO_NAMES.get(word, word) for word in words) & frozenset[str](get_args(Feature))


class InstructionSet(Document):
    """The instructions that matter to the kernels of language models, of one architecture."""

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
    """How quickly a runtime's kernels for a family of formats multiply.

    Attributes:
        family: `q4` and `q8` are llama.cpp's types of 32 weights (Q4_0, Q8_0, ...), `k` and `iq` its K and IQ types,
            `int4` and `int8` ONNX's and other runtimes', `w4a16` a neural processor's.
        repacked: Whether weights are rearranged for the instructions at load; absent where that is not known.
        feature: The instructions that the kernel uses, such as `i8mm` or `sme`; absent where that is not known.
        prefill_operations_per_s: 2 x parameters x tokens/s of a prompt of about 512 tokens.
        decode_ratio: Bytes/s that decoding draws with it, over the backend's usable bandwidth.
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


class Backend(Document):
    """One way to compute: `cpu`, or a GPU or neural processor through an interface.

    Attributes:
        name: The processor and the interface, such as `gpu:vulkan`.
        processor: What it is called, such as `Adreno 750`.
        cores: How many cores it has (GPU cores, compute units, neural cores).
        peak_bandwidth_bytes_per_s: Where it is not that of the device's memory.
        usable_bandwidth_bytes_per_s: What decoding draws on it, beside the fixed cost; the CPU's must be there.
        peak_operations_per_s: By its data sheet, in the precision that the source names.
        memory_limit_bytes: What it can address at once, where that is less than an app may use.
        fixed_seconds_per_token: A token takes its bytes over the usable bandwidth and this; absent means none.
        decode_watts: What the whole device draws while it decodes on it.
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

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        kinds = [(kernel.family, kernel.repacked, kernel.feature) for kernel in self.kernels]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise impossible("a kernel is listed twice", kind[0], "each family, repacked and feature once")
        return self


class Measured(Document):
    """A run that was timed on this very device.

    Attributes:
        backend: Where it ran.
        runtime: What ran it, with its version where known.
        model: What was run.
        format: Format or mix of the weights, by the runtime's own name.
        file_bytes: The model's file.
        read_bytes: What one token reads of it, where that is less (experts, embeddings on flash).
        parameters: Weights of the model.
        decode_tokens_per_s: Generation.
        prefill_tokens_per_s: Reading a prompt.
        prompt_tokens: Length of the prompt that was read.
        context: Tokens in the context while it decoded, on average.
        threads: Of the CPU.
        peak_bytes: Memory of the process.
        basis: `measured` by this exporter, `published` elsewhere.
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
        """Bytes/s that decoding draws, zero where it was not measured."""
        return (self.read_bytes or self.file_bytes) * (self.decode_tokens_per_s or 0.0)
