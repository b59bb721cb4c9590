"""ONNX Runtime and onnxruntime-genai in a child process."""

import time

import numpy as np
import onnxruntime_genai as genai

from exporter.formats.format import Float32
from exporter.targets.artifact import Artifact
from exporter.targets.onnx.decoder import DecoderFolder
from exporter.targets.onnx.session import MODEL_FILE, Session, genai_generator, genai_model
from exporter.targets.runtime import Timing, require_tokens, resident_bytes

# Multiply weights behind a `DequantizeLinear` by float32 activations, which the graph's own quantisers have rounded.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


class OnnxRuntime(DecoderFolder):
    """A decoder folder: logits through onnxruntime, text through onnxruntime-genai. Each is loaded when needed.

    Args:
        artifact: A folder with model.onnx, its data, genai_config.json and the tokenizer.
        context: Tokens a sequence may have.
        threads: Threads to compute with.
        exact: Use float32 activations where the graph does not say how they are rounded. By default, ONNX Runtime
            rounds the inputs of weights behind a `DequantizeLinear` to int8 in blocks.
        sequences: Must be 1.
    """

    title = "ONNX Runtime"

    def __init__(self, artifact: Artifact, context: int, threads: int, exact: bool, sequences: int) -> None:
        super().__init__(artifact, sequences)
        self._context_size = context
        self._threads = threads
        self._exact = exact
        self._before = resident_bytes()
        self._loaded_session: Session | None = None
        self._loaded_model: genai.Model | None = None
        self._load_s = 0.0

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        require_tokens(tokens, self._vocab)
        logits: Float32 = self._session().logits(tokens)[first:]
        return logits

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Return `count` greedy tokens, fewer if the model ends its text."""
        generator = self._generator(len(tokens) + count)
        generator.append_tokens(np.array([tokens], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        made = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
        return made[:-1] if made and made[-1] in self._ends else made

    def measure(self, prompt: list[int], decode: int, repeats: int) -> Timing:
        """Time prefill and decode after one warm-up; medians over the repeats."""
        self._model()
        self.generate(prompt, 2)
        prefills, decodes = [], []
        for _ in range(repeats):
            generator = self._generator(len(prompt) + decode + 1, min_length=len(prompt) + decode + 1)
            started = time.perf_counter()
            generator.append_tokens(np.array([prompt], np.int32))
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(decode):
                generator.generate_next_token()
            prefills.append(first - started)
            decodes.append(time.perf_counter() - first)
            # Otherwise it would keep its keys and values while the next one allocates its own.
            del generator
        return Timing.of(len(prompt), prefills, decode, decodes, self._load_s, self._before)

    def _session(self) -> Session:
        if self._loaded_session is None:
            path, entries = str(self._folder / MODEL_FILE), self._options | (EXACT if self._exact else {})
            self._loaded_session = Session(path, self._head_width, self._threads, entries)
        return self._loaded_session

    def _model(self) -> genai.Model:
        if self._loaded_model is None:
            started = time.perf_counter()
            self._loaded_model = genai_model(self._folder, self._threads)
            self._load_s = time.perf_counter() - started
        return self._loaded_model

    def _generator(self, length: int, **search: object) -> genai.Generator:
        generator: genai.Generator = genai_generator(self._model(), min(length, self._context_size), **search)
        return generator


RUNTIME = OnnxRuntime
