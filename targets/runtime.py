"""What every runtime answers from its child process, and what a run of it measured."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.targets.artifact import Artifact


@dataclass(frozen=True)
class Timing:
    """Medians over repeats, of one process.

    Attributes:
        prefill_tokens_per_s: Tokens of the prompt over the time of one pass.
        decode_tokens_per_s: Tokens generated one at a time, after the prompt, over their time.
        first_token_s: Seconds from the prompt's tokens to the first logits, model already loaded.
        load_s: Seconds to load the model.
        peak_bytes: The process's largest resident set.
        interpreter_bytes: Its resident set before the model was loaded.
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
            prefills: Seconds of its passes.
            decode: Tokens generated after it.
            decodes: Their seconds.
            load_s: Seconds to load the model.
            before: The process's resident set before that.
        """
        first_token_s = median(prefills)
        return cls(
            prompt / first_token_s, decode / median(decodes), first_token_s, load_s, peak_resident_bytes(), before
        )


@dataclass(frozen=True)
class Residence:
    """What a model took whose weights stay coded in memory.

    Attributes:
        resident_bytes: The most by which the process grew while it computed: weights coded, plain, and being decoded,
            and all else that the model takes.
        weight_bytes: Bytes of the weights in the files that runtimes load plain.
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
        """Return `count` greedy tokens, fewer where the model ends its text."""

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode."""

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime gives them to the model, special tokens in the text recognised."""

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, special tokens left out."""


class SamplingRuntime(Runtime, Protocol):
    """A runtime that continues several texts at once."""

    def sample(self, texts: list[list[int]], length: int, seed: int) -> list[list[int]]:
        """Continue several texts at once, at temperature 1, to `length` tokens each.

        A call whose texts begin with what the last call returned goes on from its keys and values.

        Args:
            texts: One list of tokens for each sequence of the context.
            length: Tokens that each text has in the end.
            seed: Seed of the noise; token and position decide the draw, not the number of calls.
        """


class CodedRuntime(Runtime, Protocol):
    """A runtime whose artifact's files stay coded in memory."""

    def keep_up(self, tokens_per_s: float) -> None:
        """Keep as many parts plain as generating so fast takes, now and from now on; 0 keeps none.

        Raises:
            RequestError: this machine is slower although all weights are plain.
        """

    def residence(self) -> Residence:
        """Return what the process took at most since the floor was set."""


def require_tokens(tokens: list[int], vocab: int) -> None:
    """Refuse ids that a model of so many tokens does not have.

    Raises:
        InputError: there is one.
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
        # getrusage would count the parent's pages from before exec.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
