"""A decoder whose weights stay coded in memory: each part of its graph is decoded just before its use, then dropped.

Each part runs in its own session of ONNX Runtime, so its kernels and logits are those of the whole graph. Decoding a
part and making its session cost far more than one token's multiplications with it; a plain part costs memory instead.
The requested speed determines how many parts are kept plain.
"""

import ctypes
import platform
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from exporter.coding.container import SUFFIX, restored
from exporter.coding.in_memory import ResidentFile
from exporter.formats.format import Bytes, Float32
from exporter.foundation.errors import RequestError
from exporter.targets.artifact import Artifact
from exporter.targets.onnx.coded_layout import MOST_GRAPH_BYTES
from exporter.targets.onnx.decoder import DecoderFolder
from exporter.targets.onnx.graph_partition import IDS, LOGITS, MASK, Segment, cut
from exporter.targets.onnx.plain_weight_budget import PlainWeightBudget
from exporter.targets.onnx.session import empty_shape, present_of
from exporter.targets.runtime import CodedResidence, Timing, require_tokens, resident_bytes

Values = dict[str, NDArray[Any]]
# Spinning threads of dozens of sessions would compete for the same cores.
IDLE = {"session.intra_op.allow_spinning": "0"}
# A part with fewer bytes, such as the last normalisation, is never worth decoding again.
LEAST_BYTES = 1 << 16
# The C library if it is glibc, and a constant of its malloc.h.
LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
M_ARENA_MAX = -8
# Number of sessions made at a time; each worker holds the weights of one part.
WORKERS = 2
# Tokens within which the share of plain weights must settle.
ATTEMPTS = 60


class CodedOnnxRuntime(DecoderFolder):
    """A decoder folder whose model files are coded.

    Args:
        artifact: A folder with model.onnx.coded and model.onnx.data.coded, genai_config.json and the tokenizer.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Has no effect: multiplications are computed as the graph says.
        sequences: Must be 1.
    """

    title = "ONNX Runtime on coded weights"

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        super().__init__(artifact, sequences)
        _use_one_heap()
        started, self._before = time.perf_counter(), resident_bytes()
        self._context_size = context
        self._threads = threads
        coded = {path.name.removesuffix(SUFFIX): path for path in artifact.weights}
        graph = restored(coded["model.onnx"], MOST_GRAPH_BYTES)
        self._cut = cut(graph, coded["model.onnx"])
        self._file = ResidentFile(coded["model.onnx.data"], (weight.section for weight in self._cut.weights))
        self._workers = ThreadPoolExecutor(WORKERS)
        parts = self._cut.parts
        self._large = {part.name: part for part in parts if part.weight_bytes >= LEAST_BYTES}
        # Sessions of parts whose weights are plain.
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._most_bytes = 0
        self._vocab = self._cut.lookup.weights[0].shape[0]
        for part in parts:
            if part.name not in self._large:
                self._sessions[part.name] = self._made(part)[0]
        self._tables = {table.name: table.array(*self._file.read([table.span])) for table in self._cut.tables}
        self._share = PlainWeightBudget({})
        self.keep_up(0)
        _give_back()
        self._load_s = time.perf_counter() - started

    def keep_up(self, tokens_per_s: float) -> None:
        """Keep enough parts plain, from this call on, to generate at this speed; 0 keeps none.

        Raises:
            RequestError: this machine is slower even with all weights plain.
        """
        self._share = PlainWeightBudget({name: part.weight_bytes for name, part in self._large.items()}, tokens_per_s)
        self._settle()
        if tokens_per_s:
            tokens = self._generated([0], ATTEMPTS, ends=False)
            while not self._share.settled and not self._share.exhausted and next(tokens, None) is not None:
                pass
            if not self._share.settled:
                speed = self._share.tokens_per_s
                raise RequestError(
                    "the model is slower than that on this machine",
                    got="no steady speed" if speed is None else f"{speed:.3g} tokens/s with all weights plain",
                    expected=f"{tokens_per_s:g}", next_step="ask for less, or unpack the bundle and run it plain",
                )  # fmt: skip
        self._most_bytes = 0

    def residence(self) -> CodedResidence:
        """Return the peak memory use since the floor was set."""
        kept = len(self._share.kept)
        return CodedResidence(
            self._most_bytes, sum(weight.span.size for weight in self._cut.weights), len(self._large) - kept, kept,
            self._share.tokens_per_s,
        )  # fmt: skip

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        require_tokens(tokens, self._vocab)
        return self._forward(tokens, self._nothing(), first)[0]

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Return `count` greedy tokens, fewer if the model ends its text."""
        return list(self._generated(tokens, min(count, self._context_size - len(tokens))))

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode after one warm-up; medians over the repeats."""
        list(self._generated(prompt, 2))
        prefills, decodes = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            made = self._generated(prompt, decode + 1, ends=False)
            next(made)
            first = time.perf_counter()
            for _ in made:
                pass
            prefills.append(first - started)
            decodes.append(time.perf_counter() - first)
        return Timing.of(len(prompt), prefills, decode, decodes, self._load_s, self._before)

    def _generated(self, tokens: list[int], count: int, ends: bool = True) -> Iterator[int]:
        """Yield greedy tokens; those after the first adapt which parts are plain."""
        given, past = tokens, self._nothing()
        for number in range(count):
            started = time.perf_counter()
            logits, past = self._forward(given, past, len(given) - 1)
            if number:
                self._share.adapt(time.perf_counter() - started)
            token = int(logits[-1].argmax())
            if ends and token in self._ends:
                return
            yield token
            given = [token]

    def _forward(self, tokens: list[int], past: Values, first: int) -> tuple[Float32, Values]:
        """Return logits, float32 [tokens - first, vocab], and what layers keep of all tokens so far."""
        before = next(kept.shape[2] for kept in past.values() if kept.ndim == 4)
        values: Values = {MASK: np.ones((1, before + len(tokens)), np.int64), **past, **self._tables}
        values |= self._looked_up(tokens)
        present: Values = {}
        plain = len(self._sessions)
        logits, done = np.empty((len(tokens) - first, self._vocab), np.float32), 0
        for part, session in self._in_turn():
            self._most_bytes = max(self._most_bytes, resident_bytes() - self._before)
            if part in self._cut.head:
                (given,) = part.inputs
                some = session.run([LOGITS], {given.name: values[given.name][:, first:]})[0][0]
                logits[:, done : done + some.shape[-1]] = some
                done += some.shape[-1]
                continue
            names = [value.name for value in part.outputs]
            made = dict(
                zip(names, session.run(names, {one.name: values[one.name] for one in part.inputs}), strict=True)
            )
            present |= {name: made.pop(present_of(name)) for name in part.past}
            values |= made
            for name in self._cut.spent[part.name]:
                values.pop(name, None)
        if len(self._sessions) > plain:
            self._settle()
        return logits, present

    def _in_turn(self) -> Iterator[tuple[Segment, onnxruntime.InferenceSession]]:
        """Yield every part with its session; sessions of the next coded parts are made while one runs."""
        coming = iter([part for part in self._cut.parts if part.name not in self._sessions])
        waiting = deque(self._workers.submit(self._made, part) for part in islice(coming, WORKERS))
        for part in self._cut.parts:
            if part.name in self._sessions:
                yield part, self._sessions[part.name]
                continue
            session, seconds = waiting.popleft().result()
            waiting += [self._workers.submit(self._made, following) for following in islice(coming, 1)]
            self._share.spent(part.name, seconds / WORKERS)
            if part.name in self._share.kept:
                self._sessions[part.name] = session
            yield part, session
            del session

    def _made(self, part: Segment) -> tuple[onnxruntime.InferenceSession, float]:
        """Return a session of a part and the seconds that making it took."""
        started = time.perf_counter()
        session = self._session(part, self._file.read([weight.span for weight in part.weights]))
        return session, time.perf_counter() - started

    def _settle(self) -> None:
        """Drop sessions of parts that are no longer kept, and coded weights of those that are."""
        for name in self._large:
            if name not in self._share.kept:
                self._sessions.pop(name, None)
        coded = [part for name, part in self._large.items() if name not in self._sessions]
        self._file.hold([weight.span for part in (*coded, self._cut.lookup) for weight in part.weights])

    def _looked_up(self, tokens: list[int]) -> Values:
        """Return the embedding's rows for tokens; only these rows of the table are decoded."""
        lookup, (output,) = self._cut.lookup, self._cut.lookup.outputs
        rows, places = np.unique(np.array(tokens, np.int64), return_inverse=True)
        found = self._file.read([weight.rows(int(row), 1).span for weight in lookup.weights for row in rows])
        stacked = [np.concatenate(found[place : place + len(rows)]) for place in range(0, len(found), len(rows))]
        table = self._session(lookup.of_height(len(rows)), stacked)
        return {output.name: table.run([output.name], {IDS: places.reshape(1, -1)})[0]}

    def _nothing(self) -> Values:
        """Return what layers keep before the first token."""
        return {
            name: np.zeros(empty_shape(shape, self._head_width), np.float32)
            for part in self._cut.layers
            for name, shape in part.past.items()
        }

    def _session(self, part: Segment, weights: list[Bytes]) -> onnxruntime.InferenceSession:
        options = self._session_options(self._threads, IDLE)
        options.enable_cpu_mem_arena = False
        values = [weight.array(data) for weight, data in zip(part.weights, weights, strict=True)]
        given = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in values]
        options.add_external_initializers([weight.name for weight in part.weights], given)
        return onnxruntime.InferenceSession(part.model, options, providers=["CPUExecutionProvider"])


def _use_one_heap() -> None:
    """Make all threads of this process allocate from one heap, if the C library is glibc.

    Streamed weights are allocated in one thread and freed in another. With one heap per thread, glibc keeps the freed
    memory (35 MB on the demo model).
    """
    if LIBC is not None:
        LIBC.mallopt(M_ARENA_MAX, 1)


def _give_back() -> None:
    """Return freed memory to the system, if the C library is glibc."""
    if LIBC is not None:
        LIBC.malloc_trim(0)


RUNTIME = CodedOnnxRuntime
