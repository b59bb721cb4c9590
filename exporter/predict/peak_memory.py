"""The peak memory of a runtime's process: its own code, weights, keys and values, and buffers.

This is the largest resident set of the process including mapped files, as measured by `exporter.targets.runtime`. How
a runtime holds weights, keys and values is its target's to say; see the module `memory` in a target's folder.
"""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from exporter.device.backend import features_named
from exporter.foundation.fitted import fitted_constants

MIB = 1 << 20


@dataclass(frozen=True)
class Overhead:
    """The fitted memory overhead of a runtime.

    Attributes:
        process_bytes: Python, NumPy, the runtime's libraries, and the fixed cost of a loaded model.
        token_bytes: Bytes per token of the vocabulary.
        residual_floats: Buffers of a prompt token, in float32 numbers per element of the residual stream.
        projected_floats: The same per element of its queries, keys and values.
        intermediate_floats: The same per channel of the feed-forward part.
    """

    process_bytes: int
    token_bytes: int
    residual_floats: float
    projected_floats: float
    intermediate_floats: float

    @classmethod
    def fitted(cls, package: str) -> "Overhead":
        """Return the overhead that the fitted constants of a target's package state."""
        found = fitted_constants(package)
        floats = (found[f"{name}_floats"].value for name in ("residual", "projected", "intermediate"))
        return cls(int(found["process_mib"].value * MIB), int(found["vocabulary_token_bytes"].value), *floats)

    def of_vocabulary(self, tokens: int) -> int:
        """Return the bytes of the process with a vocabulary of so many tokens."""
        return self.process_bytes + self.token_bytes * tokens


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder that determine its memory; see `exporter.model.shape.Shape`.

    The states of short convolutions are not among them: they hold a few positions, however long the context is.
    `keys` is the number of channels of the keys of all layers; None if all layers of attention have own ones, alike.
    """

    attention_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    keys: int | None = None

    def cache_bytes(self, tokens: int, bytes_a_value: int) -> int:
        """Return the size of the keys and values of `tokens` tokens."""
        channels = self.attention_layers * self.kv_heads * self.head_dim if self.keys is None else self.keys
        return 2 * bytes_a_value * tokens * channels

    def token_bytes(self, overhead: Overhead) -> float:
        """Return the buffer size of one prompt token."""
        projected = (self.heads + 2 * self.kv_heads) * self.head_dim
        return 4 * (
            overhead.residual_floats * self.hidden
            + overhead.projected_floats * projected
            + overhead.intermediate_floats * self.intermediate
        )


@dataclass(frozen=True)
class SizedModel:
    """A model of which only a little is known.

    Attributes:
        file_bytes: Size of its files.
        parameters: Number of weights.
        format: Their format, as users write it.
    """

    file_bytes: int
    parameters: float
    format: str

    def looked_up(self, shape: ModelShape) -> float:
        """Return the share of the embedding among the weights if the model has a shape."""
        return min(0.5, shape.vocab * shape.hidden / self.parameters)


@dataclass(frozen=True)
class Weights:
    """The memory of a model's weights in a runtime, in bytes.

    Attributes:
        resident_bytes: After loading: pages of the mapped file, and repacked copies for the kernels.
        loading_bytes: Peak during loading.
    """

    resident_bytes: int
    loading_bytes: int


@dataclass(frozen=True)
class Peak:
    """The memory of a runtime's process by use, in bytes.

    Attributes:
        process_bytes: Interpreter, libraries, vocabulary.
        weights: The model.
        cache_bytes: Keys and values of the whole context, allocated at the start.
        buffer_bytes: Activations and logits of the prompt tokens processed at once.
    """

    process_bytes: int
    weights: Weights
    cache_bytes: int
    buffer_bytes: int

    @property
    def bytes(self) -> int:
        """The peak, reached either during loading or while processing a prompt."""
        running = self.weights.resident_bytes + self.cache_bytes + self.buffer_bytes
        return self.process_bytes + max(self.weights.loading_bytes, running)


def host_features() -> frozenset[str]:
    """Return this machine's features that select kernels, named as in device profiles."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return frozenset({"neon", "dotprod"})
    path = Path("/proc/cpuinfo")
    words = path.read_text(encoding="utf-8", errors="replace").split() if path.is_file() else []
    return features_named(words) & {"avx2", "avx512", "avx-vnni", "neon", "dotprod", "i8mm"}
