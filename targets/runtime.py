"""The interface of runtimes in a child process, and the results of their measurements."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.foundation.systems import peak_memory
from exporter.targets.artifact import Artifact


@dataclass(frozen=True)
class Timing:
    """Medians over repeats in one process.

    Attributes:
        prefill_tokens_per_s: Tokens of the prompt divided by the time of one pass.
        decode_tokens_per_s: Tokens generated one at a time after the prompt, divided by their time.
        first_token_s: Seconds from the prompt's tokens to the first logits, with the model already loaded.
        load_s: Seconds to load the model.
        peak_bytes: Peak resident set of the process.
        interpreter_bytes: Resident set before the model was loaded.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float
    load_s: float
    peak_bytes: int
    interpreter_bytes: int

    @classmethod
    def of(
        cls, prompt: int, prefills: list[float], decode: int, decodes: list[float], load_s: float, before: int
    ) -> "Timing":
        """Return the medians over repeats in this process.

        Args:
            prompt: Tokens of the prompt.
            prefills: Seconds of each pass over the prompt.
            decode: Tokens generated after the prompt.
            decodes: Seconds of each generation.
            load_s: Seconds to load the model.
            before: Resident set of the process before loading.
        """
        first_token_s = median(prefills)
        return cls(
            prompt / first_token_s, decode / median(decodes), first_token_s, load_s, peak_resident_bytes(), before
        )


@dataclass(frozen=True)
class CodedResidence:
    """Memory use of a model whose weights stay coded in memory.

    Attributes:
        resident_bytes: Peak growth of the process while it computed: coded weights, plain weights, weights being
            decoded, and all other memory of the model.
        weight_bytes: Bytes of the weights in the plain files that runtimes load.
        coded_parts: Parts of the model whose weights are coded.
        plain_parts: Parts whose weights are kept plain.
        tokens_per_s: Speed of the last tokens; None where there were too few.
    """

    resident_bytes: int
    weight_bytes: int
    coded_parts: int
    plain_parts: int
    tokens_per_s: float | None


class Runtime(Protocol):
    """A loaded artifact inside a child process. Token ids are lists of int throughout."""

    title: str

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        """Load an artifact; see `exporter.targets.opened.OpenedArtifact`."""

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Return `count` greedy tokens, fewer if the model ends its text."""

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode."""

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime passes them to the model; special tokens in the text are recognised."""

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""

    def positions(self) -> int:
        """Return the most tokens that the artifact was made for."""


class SamplingRuntime(Runtime, Protocol):
    """A runtime that continues several texts at once."""

    def sample(self, texts: list[list[int]], length: int, seed: int) -> list[list[int]]:
        """Continue several texts at once, at temperature 1, to `length` tokens each.

        If the texts are the last call's result, its keys and values are reused.

        Args:
            texts: One list of tokens per sequence of the context.
            length: Final number of tokens of each text.
            seed: Seed of the noise; each draw depends on it, the position and the index of the text alone.
        """


class CodedRuntime(Runtime, Protocol):
    """A runtime for artifacts whose files stay coded in memory."""

    def keep_up(self, tokens_per_s: float) -> None:
        """Keep enough parts plain, from this call on, to generate at this speed; 0 keeps none.

        Raises:
            RequestError: this machine is slower even with all weights plain.
        """

    def residence(self) -> CodedResidence:
        """Return the peak memory use since the floor was set."""


def require_tokens(tokens: list[int], vocab: int) -> None:
    """Refuse ids outside a vocabulary of this size.

    Raises:
        InputError: an id is outside it.
    """
    wrong = next((token for token in tokens if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError("the model has no such token", got=wrong, expected=f"0 to {vocab - 1:,}")


def resident_bytes() -> int:
    """Return this process's resident set."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return this process's largest resident set since it started."""
    if sys.platform == "linux":
        # getrusage would also count the parent's pages from before exec.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return peak_memory() * scale
