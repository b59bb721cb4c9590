"""An artifact that a runtime has loaded in a child process, and how long and how large it may become there."""

from types import TracebackType
from typing import Never, Self

from exporter.child.process import Child
from exporter.emulate.sandbox.limits import TIMED_BYTES_PER_S, TIMEOUT_S
from exporter.formats.format import Float32
from exporter.foundation.errors import RuntimeCrashError
from exporter.targets.artifact import Artifact, coded_runtime_of, runtime_of
from exporter.targets.runtime import CodedRuntime, Residence, Runtime, SamplingRuntime, Timing

# Of text, which takes milliseconds; a runtime may load its tokenizer first.
TEXT_S = 60.0
# Weights read times tokens computed: two busy cores are some fifty times as quick.
LEAST_BYTES_PER_S = 1e8
# Tokens that finding the share of plain weights takes at most, with each part decoded for each.
SETTLING_TOKENS = 64
# A runtime may hold its own copy of the weights, in float32 where the file has int4.
TIMES_THE_FILE = 8
# Keys, values, activations and logits of one token, of models that fit a machine; what a runtime takes in any case.
BYTES_PER_TOKEN, LEAST_BYTES = 4 << 20, 2 << 30


class OpenedArtifact:
    """An artifact in a child process: answers as `exporter.targets.runtime.Runtime` does, each call with a deadline.

    What loading raises, the first call raises.

    Args:
        artifact: What to load.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Avoid the runtime's own rounding where it can be avoided: float32 keys, values and activations.
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
        """Return `count` greedy tokens, fewer where the model ends its text."""
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
        """Return token ids as the runtime gives them to the model, special tokens in the text recognised."""
        return self._child.call(Runtime.tokenize, TEXT_S, text)

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, special tokens left out."""
        return self._child.call(Runtime.text, TEXT_S, tokens)

    def keep_up(self, tokens_per_s: float) -> None:
        """Keep as many parts of coded files plain as generating so fast takes; see `CodedRuntime`."""
        self._child.call(CodedRuntime.keep_up, self._seconds(SETTLING_TOKENS), tokens_per_s)

    def residence(self) -> Residence:
        """Return what coded files took at most since the floor was set."""
        return self._child.call(CodedRuntime.residence, TEXT_S)

    def _seconds(self, tokens: int) -> float:
        """Return the deadline of work on tokens: as long as the slowest machine takes that is of use."""
        return TIMEOUT_S + self._file_bytes / TIMED_BYTES_PER_S + self._file_bytes * tokens / LEAST_BYTES_PER_S

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


def memory_bytes(artifact: Artifact, tokens: int) -> int:
    """Return how much memory a runtime may take for an artifact and so many tokens of context in all."""
    return LEAST_BYTES + TIMES_THE_FILE * artifact.file_bytes + BYTES_PER_TOKEN * tokens
