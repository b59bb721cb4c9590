"""What every runtime answers from its child process, and what a run of it measured."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.targets.artifact import Artifact
from exporter.weights.format import Float32


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


class Runtime(Protocol):
    """A loaded artifact inside a child process. Token ids are lists of int throughout."""

    title: str
    serves: bool

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        """Load an artifact; see `open_artifact`."""

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

    def render_chat(self, messages: list[dict[str, str]], prompt: bool) -> str | None:
        """Return a chat as the runtime renders it, or None where the template refuses it.

        Args:
            messages: Dictionaries with `role` and `content`.
            prompt: Ask for the start of an answer at the end.
        """


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
