"""What llama.cpp needs in the emulated ARM64 system: a program, compiled from the source of its package."""

from importlib.resources import files
from pathlib import Path

from exporter.emulate.arm64.installation import Needs, Program

# The version of the package for this machine.
SOURCE = ("llama-cpp-python==0.3.36", ("832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",))
INSIDE = "*/vendor/llama.cpp"
# GCC 12.2's vectoriser miscompiles ggml's Q4_K kernel with i8mm: KL 5.9 nats instead of 0.12 on a tiny model.
WITHOUT_VECTORISER = {"CMAKE_C_FLAGS": "-fno-tree-vectorize", "CMAKE_CXX_FLAGS": "-fno-tree-vectorize"}

NEEDS = Needs(
    program=Program(
        title="llama.cpp",
        files="GGUF files",
        source=SOURCE,
        inside=INSIDE,
        project=Path(str(files("exporter.targets.gguf"))) / "emulated_main",
        settings={
            **WITHOUT_VECTORISER,
            "GGML_NATIVE": "OFF",
            "LLAMA_BUILD_COMMON": "OFF",
            "LLAMA_CURL": "OFF",
        },
        source_setting="LLAMA_CPP",
        core_setting="GGML_CPU_ARM_ARCH",
    )
)
