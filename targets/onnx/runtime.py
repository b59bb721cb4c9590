"""ONNX Runtime and onnxruntime-genai in a child process."""

import json
import time

import numpy as np
import onnxruntime
import onnxruntime_genai as genai

from exporter.formats.format import Float32
from exporter.targets.artifact import Artifact
from exporter.targets.onnx.decoder import DecoderFolder
from exporter.targets.runtime import Timing, require_tokens, resident_bytes

# Multiply weights behind a `DequantizeLinear` by float32 activations.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}


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
        self._loaded_session: onnxruntime.InferenceSession | None = None
        self._loaded_model: genai.Model | None = None
        self._load_s = 0.0

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        require_tokens(tokens, self._vocab)
        session = self._session()
        count = len(tokens)
        feeds = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, count), np.int64)}
        if any(given.name == "position_ids" for given in session.get_inputs()):
            feeds["position_ids"] = np.arange(count, dtype=np.int64)[None]
        for given in session.get_inputs():
            if given.name.startswith("past_key_values."):
                feeds[given.name] = np.zeros((1, given.shape[1], 0, self._head_width), np.float32)
        logits: Float32 = session.run(["logits"], feeds)[0][0, first:]
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

    def _session(self) -> onnxruntime.InferenceSession:
        if self._loaded_session is None:
            options = self._session_options(self._threads, EXACT if self._exact else {})
            path = str(self._folder / "model.onnx")
            self._loaded_session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self._loaded_session

    def _model(self) -> genai.Model:
        if self._loaded_model is None:
            started = time.perf_counter()
            config = genai.Config(str(self._folder))
            threads = {"intra_op_num_threads": self._threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
            self._loaded_model = genai.Model(config)
            self._load_s = time.perf_counter() - started
        return self._loaded_model

    def _generator(self, length: int, **search: object) -> genai.Generator:
        model = self._model()
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=min(length, self._context_size), do_sample=False, **search)
        return genai.Generator(model, parameters)


RUNTIME = OnnxRuntime
