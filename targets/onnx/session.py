"""A decoder folder in ONNX Runtime: what runs on this machine, and, sent there beside a program, on a device.

The file stands alone: Python 3.8, numpy and onnxruntime; onnxruntime-genai where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Set before the import: otherwise ONNX Runtime contacts a host of its vendor and stores a device id in the home folder.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Modules and their packages.
NEEDED = (("numpy", "numpy"), ("onnxruntime", "onnxruntime"))
GENAI = "onnxruntime_genai"
MODEL_FILE, CONFIGURATION = "model.onnx", "genai_config.json"
# What the names of keys, values and states of convolutions begin with: `past_key_values.3.key`, `past.3.conv`.
PAST = "past"


def decoder_settings(folder: Path) -> dict[str, Any]:
    """Return the decoder's settings in genai_config.json, whose session options are those of ONNX Runtime itself."""
    settings: dict[str, Any] = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))["model"]["decoder"]
    # onnxruntime-genai passes names that it does not know to the session; those of ONNX Runtime have dots.
    options = {name: value for name, value in settings["session_options"].items() if "." in name}
    return {**settings, "session_options": options}


def session_options(threads: int, entries: Mapping[str, str]) -> Any:
    """Return session options with entries of ONNX Runtime's own."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    return options


def present_of(past: str) -> str:
    """Return the output with what an input becomes."""
    return "present." + past.split(".", 1)[1]


def empty_shape(given: Sequence[Any], head_width: int) -> tuple[int, ...]:
    """Return the shape of an input before the first token.

    Args:
        given: Its shape in the graph: [batch, heads, tokens, width] of keys and values, [batch, channels, positions] of
            a convolution, whose state is as long at the start and all zeros.
        head_width: Width of keys and values.
    """
    return (1, given[1], 0, head_width) if len(given) == 4 else (1, *given[1:])


class Session:
    """A decoder in plain onnxruntime; keys and values stay in the runtime's own memory.

    Args:
        path: The graph.
        head_width: Width of keys and values.
        threads: Threads to compute with.
        entries: Session options by name.
        context: Tokens that are read at once in a measurement.
    """

    def __init__(self, path: str, head_width: int, threads: int, entries: Mapping[str, str], context: int = 0) -> None:
        import numpy as np
        import onnxruntime

        self._np, self._api, self.batch = np, onnxruntime, context
        options = session_options(threads, entries)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._width = head_width
        self.start([])

    @property
    def runtime(self) -> str:
        """Package and version."""
        return f"onnxruntime {version('onnxruntime')}"

    def describe(self) -> dict[str, Any]:
        """Return that the runtime does not describe the model."""
        return {"model_type": None, "model_n_params": None}

    def start(self, tokens: Sequence[int]) -> None:
        """Forget earlier tokens, and read some."""
        shapes = {
            name: empty_shape(one.shape, self._width) for name, one in self._inputs.items() if name.startswith(PAST)
        }
        self._past = {name: self._value(self._np.zeros(shape, self._np.float32)) for name, shape in shapes.items()}
        self._length = 0
        if tokens:
            self.read(tokens)

    def read(self, tokens: Sequence[int]) -> Any:
        """Process tokens at once; return their logits, float32 [1, tokens, vocab], in the runtime's own memory."""
        np, end = self._np, self._length + len(tokens)
        feeds = {"input_ids": np.array([tokens], np.int64), "attention_mask": np.ones((1, end), np.int64)}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.arange(self._length, end, dtype=np.int64)[None]
        values = {name: self._value(array) for name, array in feeds.items()}
        presents = ["logits", *map(present_of, self._past)]
        logits, *made = self._session.run_with_ort_values(presents, {**values, **self._past})
        self._past, self._length = dict(zip(self._past, made)), end  # noqa: B905  (Python 3.8 knows no `strict`)
        return logits

    def generate(self, tokens: Sequence[int]) -> None:
        """Process tokens one at a time, as in generation."""
        for token in tokens:
            self.read([token])

    def logits(self, tokens: Sequence[int]) -> Any:
        """Return the logits after each token of a text, float32 [tokens, vocab]."""
        self.start([])
        return self.read(tokens).numpy()[0]

    def _value(self, array: Any) -> Any:
        return self._api.OrtValue.ortvalue_from_numpy(array)


def genai_model(folder: Path, threads: int) -> Any:
    """Return a decoder folder loaded by onnxruntime-genai."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return onnxruntime_genai.Model(config)


def genai_generator(model: Any, most: int, **search: Any) -> Any:
    """Return a greedy generator of at most so many tokens, the prompt's included, with further search options."""
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=most, do_sample=False, **search)
    return onnxruntime_genai.Generator(model, parameters)


class GenaiSession:
    """A decoder folder in onnxruntime-genai, for which a bundle's genai_config.json is made.

    Args:
        folder: The folder.
        threads: Threads to compute with.
        context: Tokens a text may have.
    """

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        import numpy as np

        self._np, self.batch = np, context
        self._model = genai_model(folder, threads)

    @property
    def runtime(self) -> str:
        """Package and version."""
        return f"onnxruntime-genai {version('onnxruntime-genai')}"

    def describe(self) -> dict[str, Any]:
        """Return that the runtime does not describe the model."""
        return {"model_type": None, "model_n_params": None}

    def start(self, tokens: Sequence[int]) -> None:
        """Begin a text with tokens; it does not end before the context is full."""
        self._generator = genai_generator(self._model, self.batch, min_length=self.batch)
        if tokens:
            self.read(tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Process tokens at once."""
        self._generator.append_tokens(self._np.array([tokens], self._np.int32))

    def generate(self, tokens: Sequence[int]) -> None:
        """Generate as many tokens, the model's own."""
        for _ in tokens:
            self._generator.generate_next_token()


def opened(job: dict[str, Any], context: int, timed: bool) -> Any:
    """Return the session of a measurement's job; `timed` if its speed is measured."""
    folder, threads = Path(job["folder"]), job["threads"]
    if timed and importlib.util.find_spec(GENAI):
        return GenaiSession(folder, threads, context)
    decoder = decoder_settings(folder)
    path = str(folder / MODEL_FILE)
    return Session(path, int(decoder["head_size"]), threads, decoder["session_options"], context)
