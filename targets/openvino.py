"""OpenVINO on this machine's CPU, in float32: what the judges of all targets share."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError

# By default OpenVINO computes in bfloat16 where the CPU has it, rounds activations to int8, and keys and values too.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
THREADS = "INFERENCE_NUM_THREADS"
MOST_REASON = 300


def openvino() -> Any:
    """Import OpenVINO without its telemetry.

    Its Python tools report to Google Analytics through the package `openvino_telemetry` unless a file in the user's
    home forbids it. They do without that package if it cannot be imported.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino as loaded

    return loaded


@contextmanager
def named_failure(title: str) -> Iterator[None]:
    """Report what OpenVINO cannot read or compute as one of the package's errors."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"{title} cannot run the artifact", got=_reason(str(error))) from error


def _reason(text: str) -> str:
    """Return what an error of OpenVINO says, without its places in the source code, which end with a colon."""
    lines = [line.strip() for line in text.splitlines()]
    said = [line for line in lines if line and not line.endswith(":") and not line.startswith("--")]
    return "; ".join(dict.fromkeys(said))[:MOST_REASON]


class OpenVino:
    """A decoder that OpenVINO reads from a file; see `exporter.targets.judge.Judge`.

    Args:
        path: The file.
        threads: Threads to compute with.
        head_width: Width of the keys and values among its inputs; 0 if it keeps them itself.
    """

    name = "openvino"
    title = "OpenVINO"

    def __init__(self, path: Path, threads: int, head_width: int = 0) -> None:
        api = openvino()
        self._head_width = head_width
        self._version = str(api.__version__).partition("-")[0]
        with named_failure(self.title):
            core = api.Core()
            self._compiled = core.compile_model(core.read_model(str(path)), "CPU", {**EXACT, THREADS: str(threads)})

    def version(self) -> str:
        """Return its version."""
        return self._version

    def logits(self, tokens: list[int], first: int = 0) -> Float32:
        """Return the logits after each token from position `first`, float32 [tokens - first, vocab]."""
        feeds = {given.get_any_name(): self._value(given, tokens) for given in self._compiled.inputs}
        with named_failure(self.title):
            # A new request has no keys and values of earlier texts.
            logits: Float32 = self._compiled.create_infer_request().infer(feeds)["logits"][0, first:].copy()
        return logits

    def _value(self, given: Any, tokens: list[int]) -> np.ndarray:
        """Return the value of an input for a text by itself: no earlier keys and values, one sequence."""
        known: dict[str, np.ndarray] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        name = given.get_any_name()
        if name in known:
            return known[name]
        return np.zeros((1, given.partial_shape[1].get_length(), 0, self._head_width), np.float32)
