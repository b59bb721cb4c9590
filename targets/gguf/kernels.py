"""The program that times llama.cpp's kernels on a device: ggml alone, for the instructions that the device has."""

from collections.abc import Collection
from importlib.resources import files
from pathlib import Path

from exporter.emulate.arm64.core import core_with
from exporter.targets.gguf.emulated_needs import INSIDE, SOURCE, WITHOUT_VECTORISER
from exporter.targets.gguf.target import REFERENCE, TIMED
from exporter.targets.kernel_program import KernelProgram

ARM64 = "aarch64"
# Features of profiles -> ggml's settings. Compilers take these as they are; no profile names those that come with them.
X86_SETTINGS = {
    "avx": ("GGML_SSE42", "GGML_AVX"),
    "avx2": ("GGML_AVX2", "GGML_BMI2"),
    "fma": ("GGML_FMA",),
    "f16c": ("GGML_F16C",),
    "avx-vnni": ("GGML_AVX_VNNI",),
    "avx512": ("GGML_AVX512",),
    "avx512-vnni": ("GGML_AVX512_VNNI", "GGML_AVX512_VBMI"),
    "avx512-bf16": ("GGML_AVX512_BF16",),
    "amx-int8": ("GGML_AMX_TILE", "GGML_AMX_INT8"),
}


def settings(architecture: str, features: Collection[str]) -> dict[str, str]:
    """Return ggml's settings for a processor; instructions that it lacks are not used."""
    usual = {"GGML_NATIVE": "OFF", "GGML_LLAMAFILE": "ON"}
    if architecture == ARM64:
        return {**usual, **WITHOUT_VECTORISER, "GGML_CPU_ARM_ARCH": core_with(features).march}
    own = {name: "ON" if feature in features else "OFF" for feature, names in X86_SETTINGS.items() for name in names}
    return {**usual, **own}


KERNELS = KernelProgram(
    target="gguf",
    runtime=f"llama.cpp of {SOURCE[0].replace('==', ' ')}",
    source=SOURCE,
    inside=INSIDE,
    project=Path(str(files("exporter.targets.gguf"))) / "kernels_main",
    source_setting="LLAMA_CPP",
    settings=settings,
    reference=REFERENCE,
    formats=TIMED,
)
