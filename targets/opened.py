"""An artifact loaded by a runtime in a child process, with limits on time and memory."""

from types import TracebackType
from typing import Never, Self

from exporter.child.process import Child
from exporter.emulate.sandbox.limits import TIMED_BYTES_PER_S, TIMEOUT_S
from exporter.formats.format import Float32
from exporter.foundation.errors import RuntimeCrashError
from exporter.targets.artifact import Artifact, coded_runtime_of, runtime_of
from exporter.targets.runtime import CodedResidence, CodedRuntime, Runtime, SamplingRuntime, Timing

# Deadline for text, which takes milliseconds; a runtime may load its tokenizer first.
TEXT_S = 60.0
# Weight bytes times tokens, per second; two busy cores are some fifty times as fast.
LEAST_BYTES_PER_S = 1e8
# Most tokens that finding the share of plain weights takes; each part is decoded for each token.
SETTLING_TOKENS = 64
# A runtime may hold its own copy of the weights, in float32 where the file has int4.
TIMES_THE_FILE = 8
# Keys, values, activations and logits of one token, for models that fit a machine; fixed memory of a runtime.
BYTES_PER_TOKEN, LEAST_BYTES = 4 << 20, 2 << 30


class OpenedArtifact:
    """An artifact in a child process, with the methods of `exporter.targets.runtime.Runtime`; each call has a deadline.

    The first call raises the errors of loading.

    Args:
        artifact: The artifact to load.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Avoid the runtime's own rounding where possible: float32 keys, values and activations.
        sequences: Sequences sampled at once.
    """

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool = False, sequences: int = 1) -> None:
        runtime = coded_runtime_of(artifact.target) if artifact.coded else runtime_of(artifact.target)
        self._file_bytes = artifact.file_bytes
        self._child = Child(runtime.title, memory_bytes(artifact, context * sequences))
        self._child.make(runtime, self._seconds(0), artifact, context, threads, exact, sequences)

    def ready(self) -> None:
        """Wait until it is loaded."""
        self._child.ready()

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        logits = self._child.call(Runtime.logits, self._seconds(len(tokens)), tokens, first)
        if logits.ndim != 2 or len(logits) != len(tokens) - first or not logits.size:
            self._refuse("logits of another shape", list(logits.shape), f"[{len(tokens) - first}, tokens known]")
        return logits

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Return `count` greedy tokens, fewer if the model ends its text."""
        return self._child.call(Runtime.generate, self._seconds(len(tokens) + count), tokens, count)

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode."""
        seconds = self._seconds((len(prompt) + decode) * (1 + repeats))
        return self._child.call(Runtime.measure, seconds, prompt, decode, repeats)

    def sample(self, texts: list[list[int]], length: int, seed: int) -> list[list[int]]:
        """Continue several texts at once; see `SamplingRuntime`."""
        seconds = self._seconds(sum(length - len(text) for text in texts))
        made = self._child.call(SamplingRuntime.sample, seconds, texts, length, seed)
        if [len(text) for text in made] != [length] * len(texts):
            self._refuse("texts of another length", sorted({len(text) for text in made})[:8], length)
        return made

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime passes them to the model; special tokens in the text are recognised."""
        return self._child.call(Runtime.tokenize, TEXT_S, text)

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._child.call(Runtime.text, TEXT_S, tokens)

    def positions(self) -> int:
        """Return the most tokens that the artifact was made for."""
        return self._child.call(Runtime.positions, TEXT_S)

    def keep_up(self, tokens_per_s: float) -> None:
        """Keep enough parts of coded files plain to generate at this speed; see `CodedRuntime`."""
        self._child.call(CodedRuntime.keep_up, self._seconds(SETTLING_TOKENS), tokens_per_s)

    def residence(self) -> CodedResidence:
        """Return the peak memory use of coded files since the floor was set."""
        return self._child.call(CodedRuntime.residence, TEXT_S)

    def _seconds(self, tokens: int) -> float:
        return deadline_s(self._file_bytes, tokens)

    def _refuse(self, what: str, got: object, expected: object) -> Never:
        raise RuntimeCrashError(f"{self._child.title} answered with {what}", got=got, expected=expected)

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def __enter__(self) -> Self:
        """Return the artifact."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()


def deadline_s(file_bytes: int, tokens: int) -> float:
    """Return the deadline for loading model files and work on tokens: what the slowest useful machine takes."""
    return TIMEOUT_S + file_bytes / TIMED_BYTES_PER_S + file_bytes * tokens / LEAST_BYTES_PER_S


def memory_bytes(artifact: Artifact, tokens: int) -> int:
    """Return the memory limit of a runtime, given an artifact and the total tokens of context."""
    return LEAST_BYTES + TIMES_THE_FILE * artifact.file_bytes + BYTES_PER_TOKEN * tokens
