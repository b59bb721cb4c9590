"""Predicts the memory of a runtime's process from only a file's size, its format and the number of parameters.

The unknown model is approximated by decoders with about as many parameters. Their shapes are from their published
config.json.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median_low
from typing import Protocol

from exporter.foundation.errors import RequestError
from exporter.predict.peak_memory import ModelShape, Peak, SizedModel, host_features

# Parameters; layers, hidden, intermediate, heads, key-value heads, head width, vocabulary.
SHAPES: dict[str, tuple[float, ModelShape]] = {
    "SmolLM2-135M": (0.135e9, ModelShape(30, 576, 1536, 9, 3, 64, 49152)),
    "SmolLM2-360M": (0.362e9, ModelShape(32, 960, 2560, 15, 5, 64, 49152)),
    "Qwen2.5-0.5B": (0.494e9, ModelShape(24, 896, 4864, 14, 2, 64, 151936)),
    "Qwen3-0.6B": (0.596e9, ModelShape(28, 1024, 3072, 16, 8, 128, 151936)),
    "TinyLlama-1.1B": (1.10e9, ModelShape(22, 2048, 5632, 32, 4, 64, 32000)),
    "Llama-3.2-1B": (1.24e9, ModelShape(16, 2048, 8192, 32, 8, 64, 128256)),
    "Qwen2.5-1.5B": (1.54e9, ModelShape(28, 1536, 8960, 12, 2, 128, 151936)),
    "SmolLM2-1.7B": (1.71e9, ModelShape(24, 2048, 8192, 32, 32, 64, 49152)),
    "Qwen2.5-3B": (3.09e9, ModelShape(36, 2048, 11008, 16, 2, 128, 151936)),
    "Llama-3.2-3B": (3.21e9, ModelShape(28, 3072, 8192, 24, 8, 128, 128256)),
    "Mistral-7B-v0.3": (7.25e9, ModelShape(32, 4096, 14336, 32, 8, 128, 32768)),
    "Qwen2.5-7B": (7.62e9, ModelShape(28, 3584, 18944, 28, 4, 128, 152064)),
    "Llama-3.1-8B": (8.03e9, ModelShape(32, 4096, 14336, 32, 8, 128, 128256)),
    "Qwen2.5-14B": (14.8e9, ModelShape(48, 5120, 13824, 40, 8, 128, 152064)),
    "Qwen2.5-32B": (32.8e9, ModelShape(64, 5120, 27648, 40, 8, 128, 152064)),
    "Llama-3.1-70B": (70.6e9, ModelShape(80, 8192, 28672, 64, 8, 128, 128256)),
}
# Decoders whose parameters differ by at most this factor are used, or else only the nearest.
ALIKE = 1.5
# Relative error of the targets' formulas for a known shape.
ERROR = 0.07


class Memory(Protocol):
    """The memory of a runtime's process; a target's module `memory` exports it as `MEMORY`."""

    def holds(self, format: str) -> bool:
        """Return whether the runtime is the one that loads weights in a format, as users write its name."""

    def peak(self, shape: ModelShape, model: SizedModel, context: int, features: Collection[str]) -> Peak:
        """Return the memory of the process with a model, if it has a shape.

        Args:
            shape: Assumed dimensions of the model.
            model: What is known of it.
            context: Tokens of context.
            features: Features of the processor, as in device profiles.
        """


@dataclass(frozen=True)
class Interval:
    """A number of bytes and its likely range."""

    value: int
    low: int
    high: int


def predicted_peak(
    memory: Memory, model: SizedModel, context: int, features: Collection[str] | None = None
) -> Interval:
    """Return the peak memory of a runtime's process, including its mapped file.

    Args:
        memory: The memory model of the runtime.
        model: What is known of the model.
        context: Tokens of context.
        features: Features of the processor, as in device profiles; None for this machine's.

    Raises:
        RequestError: a number is not positive.
    """
    if min(model.file_bytes, model.parameters, context) <= 0:
        raise RequestError(
            "the memory of such a model cannot be predicted",
            got=f"{model.file_bytes} bytes, {model.parameters:g} parameters, a context of {context} tokens",
            expected="numbers above zero",
        )
    known = host_features() if features is None else features
    found = sorted(memory.peak(shape, model, context, known).bytes for shape in alike(model.parameters))
    return Interval(median_low(found), int((1 - ERROR) * found[0]), int((1 + ERROR) * found[-1]))


def alike(parameters: float) -> list[ModelShape]:
    """Return the shapes of decoders with about as many parameters, at least one."""
    distances = {name: abs(math.log(parameters / count)) for name, (count, _) in SHAPES.items()}
    most = max(math.log(ALIKE), min(distances.values()))
    return [SHAPES[name][1] for name, distance in distances.items() if distance <= most]
