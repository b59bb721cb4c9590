"""llama.cpp in a child process."""

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.model.llama_vocabulary import llama_tokenize
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.ends import read_end_tokens
from exporter.targets.gguf.session import ADAPTER_FILE, BATCH, FailedError, NotLoadedError, Session
from exporter.targets.runtime import Timing, require_tokens, resident_bytes

# See WITHOUT_AMX in the Makefile.
AMX_ADVICE = (
    "this llama.cpp was compiled with AMX kernels, which crash on many machines; reinstall llama-cpp-python with "
    "--no-cache-dir --no-binary llama-cpp-python, and CFLAGS=-mno-amx-int8 CXXFLAGS=-mno-amx-int8 in the environment"
)
# Longer pieces are read a second time.
PIECE_BYTES = 256


@contextmanager
def _named_failure() -> Iterator[None]:
    """Report a failure of llama.cpp as one of the package's errors."""
    try:
        yield
    except FailedError as error:
        raise InputError(str(error)) from error


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, with an adapter if the artifact has one.

    Args:
        artifact: The GGUF file; `adapter.gguf` in the same folder is applied at full strength.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Keep keys and values in float32 (llama.cpp's default is float16).
        sequences: Sequences held at once.
    """

    title = "llama.cpp"

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        self._before = resident_bytes()
        started = time.perf_counter()
        self._log = llama_cpp.llama_log_callback(lambda level, text, _: print(text.decode(errors="replace"), end=""))
        llama_cpp.llama_log_set(self._log, None)
        try:
            self._session = Session([str(path) for path in artifact.weights], context, threads, exact, sequences)
        except NotLoadedError as error:
            raise InputError(str(error), where=error.path) from error
        self._context_size = context
        self._ends = _end_tokens(artifact, self._session.model)
        self._load_s = time.perf_counter() - started
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            # One of the last lines of the log, which are reported if the process dies.
            print(AMX_ADVICE, file=sys.stderr, flush=True)
        self._sampled: list[list[int]] = []
        self._position = 0

    @_named_failure()
    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        require_tokens(tokens, self._session.vocab_size)
        self._require_room(len(tokens))
        logits: Float32 = self._session.logits(tokens, first)
        return logits

    @_named_failure()
    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Return `count` greedy tokens, fewer if the model ends its text."""
        self._require_room(len(tokens))
        made: list[int] = []
        self._session.start(tokens)
        while len(made) < count:
            token = int(self._session.last_row().argmax())
            if self._ends_at(token):
                break
            made.append(token)
            self._require_room(len(tokens) + len(made))
            self._session.read([token])
        return made

    def _require_room(self, tokens: int) -> None:
        if tokens > self._context_size:
            raise InputError("the text is longer than the context", got=tokens, expected=self._context_size)

    def _ends_at(self, token: int) -> bool:
        """Return whether a token ends the text, as the file says or, if it does not, as llama.cpp says."""
        if self._ends is None:
            return bool(llama_cpp.llama_vocab_is_eog(self._session.vocab, token))
        return token in self._ends

    @_named_failure()
    def sample(self, texts: list[list[int]], length: int, seed: int) -> list[list[int]]:
        """Continue several texts at once; see `exporter.targets.runtime.SamplingRuntime`."""
        if texts != self._sampled:
            self._session.forget()
            self._position = 0
        texts = [list(text) for text in texts]
        for position in range(self._position, length - 1):
            rows = self._session.step([text[position] for text in texts], position)
            draws = np.random.default_rng([seed, position]).random(len(texts))
            for text, row, chance in zip(texts, rows, draws, strict=True):
                if len(text) == position + 1:
                    text.append(_drawn(row, chance))
        self._position, self._sampled = length - 1, texts
        return texts

    @_named_failure()
    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode after one warm-up; medians over the repeats."""
        self.generate(prompt[:BATCH], 2)
        prefills, decodes = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            self._session.start(prompt)
            first = time.perf_counter()
            for _ in range(decode):
                self._session.read([int(self._session.last_row().argmax())])
            prefills.append(first - started)
            decodes.append(time.perf_counter() - first)
        return Timing.of(len(prompt), prefills, decode, decodes, self._load_s, self._before)

    def tokenize(self, text: str) -> list[int]:
        """Return token ids as the runtime passes them to the model; special tokens in the text are recognised."""
        return llama_tokenize(self._session.model, text)

    def positions(self) -> int:
        """Return the most tokens that the artifact was made for."""
        return int(llama_cpp.llama_model_n_ctx_train(self._session.model))

    def text(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        pieces = (self._piece(token) for token in tokens)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def _piece(self, token: int) -> bytes:
        size = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            found = llama_cpp.llama_token_to_piece(self._session.vocab, token, buffer, size, 0, False)
            # Of a longer piece, llama.cpp returns the negative length and writes nothing.
            if -found <= size:
                return buffer.raw[: max(found, 0)]
            size = -found


def _end_tokens(artifact: Artifact, model: Any) -> frozenset[int] | None:
    """Return the ids that end a text: those of a fine-tune that is kept beside its base, or else those of the model."""
    adapter = next((path for path in artifact.weights if path.name == ADAPTER_FILE), None)
    if adapter is not None:
        # It brings libraries along whose memory would count as the runtime's.
        from exporter.targets.gguf.adapter_keys import read_adapter_text

        text = read_adapter_text(adapter)
        if text is not None:
            return frozenset(text.ends)
    return read_end_tokens(model)


def _drawn(logits: Float32, chance: float) -> int:
    """Sample a token from logits, float32 [vocab], by inverse transform of `chance` in [0, 1)."""
    sums = np.exp(logits - logits.max()).cumsum(dtype=np.float64)
    return int(np.searchsorted(sums, chance * sums[-1], side="right"))


RUNTIME = LlamaCpp
