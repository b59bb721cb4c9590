"""One model and one text to measure on: rows of the opponents, kept from run to run, and of ours."""

import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress.effort import effort
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Reference
from exporter.targets.artifact import Artifact
from tests.benchmarks import llama_opponents, onnx_opponents
from tests.benchmarks.measured import WINDOW, identity, measured, removed
from tests.benchmarks.ours import Exporter
from tests.benchmarks.rows import BENCHMARKS, KeptRows, Published, Row
from tests.reference import plain_texts

PUBLISHED = Published(BENCHMARKS / "quality.json")
EVALUATION_WINDOWS = 16
# Of the text that the exporter is calibrated on.
STOCK_WINDOWS = 32
TOOLS = ("llama-cpp-python", "onnxruntime", "onnxruntime-genai", "transformers", "torch")
CODE = ("argparse", "ast", "csv", "datetime", "heapq", "shlex", "statistics", "textwrap")


@dataclass(frozen=True)
class Conditions:
    """Which reference model, and which text it is measured on; calibration is always on prose."""

    name: str
    seed: int
    text: str


class Bench:
    """The model and texts of one set of conditions, and what is made of them in a scratch folder."""

    def __init__(self, conditions: Conditions, model: Model, scratch: Path) -> None:
        self.conditions, self.model, self._scratch = conditions, model, scratch
        prose, evaluation = plain_texts(scratch)
        if conditions.text == "code":
            evaluation = source_code(scratch)
        self._prose, self._tokenizer = prose, load_tokenizer(model.folder)
        self._stock_calibration = self._calibration(STOCK_WINDOWS)
        self._evaluation = file_windows(evaluation, self._tokenizer, EVALUATION_WINDOWS, WINDOW)
        made_of = identity(model, self._stock_calibration, self._evaluation, TOOLS)
        self._kept = KeptRows(PUBLISHED, conditions.name, made_of)
        print(f"\n{conditions.name}: {self._evaluation.tokens.shape[0]} windows of {WINDOW} tokens", flush=True)

    @cached_property
    def original(self) -> Reference:
        return Reference.of_original(self.model, self._evaluation.tokens)

    @property
    def rows(self) -> list[Row]:
        """The rows of this run."""
        return self._kept.rows

    def _folder(self, name: str = "artifact") -> AbstractContextManager[Path]:
        return removed(self._scratch / name)

    def opponent(self, name: str, kind: str, target: str, make: Callable[[Path], Artifact]) -> Row:
        """Return an opponent's row, from the file if it is there."""

        def measure() -> Row:
            with self._folder() as folder:
                return measured(self.original, make(folder), name, kind)

        return self._kept.row(name, kind, target, measure)

    def _calibration(self, windows: int) -> Windows:
        return spread_windows(self._prose, self._tokenizer, windows, WINDOW)

    def exporter(self, target: str, effort_name: str = "balanced") -> Exporter:
        """Return the exporter for the model and texts."""
        calibration = self._calibration(effort(effort_name).calibration_windows)
        return Exporter(self.model, target, calibration, self._evaluation, effort_name)

    def ours(self, exporter: Exporter, name: str, max_file_bytes: int, embedding: str | None = None) -> Row:
        """Make and measure ours within a budget."""
        with self._folder() as folder:
            made = exporter.made(max_file_bytes, folder, embedding)
            return self._kept.keep(measured(self.original, made.artifact, name, "ours", made.predicted))

    def alike(self, exporter: Exporter, name: str, embedding: str) -> Row:
        """Make and measure ours with one format for the embedding and another for all other matrices."""
        with self._folder() as folder:
            made = exporter.alike(name, embedding, folder)
            return self._kept.keep(measured(self.original, made.artifact, name, "ours", made.predicted))

    def packed(self, artifact: Artifact, name: str) -> Row:
        """Measure what the command line made."""
        return self._kept.keep(measured(self.original, artifact, name, "ours"))

    def finish(self) -> None:
        """Drop rows that are no longer measured."""
        self._kept.finish()

    @cached_property
    def _importance(self) -> dict[str, np.ndarray]:
        return llama_opponents.importance(self.model, self._stock_calibration.tokens)

    @cached_property
    def _floats(self) -> Path:
        return llama_opponents.floats(self.model, self._scratch / "floats")

    def llama(self, name: str, kind: str, asked: str) -> Row:
        """Measure what llama.cpp's quantiser makes."""
        return self.opponent(
            name, kind, "gguf", lambda to: llama_opponents.quantised(self._floats, to, asked, self._importance)
        )

    def _built(self, name: str, to: Path) -> Artifact:
        return onnx_opponents.built(self.model.folder, to, *onnx_opponents.SETTINGS[name])

    def builder(self, name: str) -> Row:
        """Measure one of the builder's settings."""
        return self.opponent(name, "stock", "onnx", lambda to: self._built(name, to))

    def float16(self, name: str) -> Row:
        """Measure the builder's setting with float16 scales."""

        def make(to: Path) -> Artifact:
            with self._folder("base") as base:
                return onnx_opponents.with_float16_scales(self._built(name, base), to)

        return self.opponent(f"{name}; float16 scales", "hand-made", "onnx", make)

    def own_quantiser(self, algorithm: str, name: str) -> Row:
        """Measure onnxruntime's own GPTQ or HQQ, with embedding and head as the builder's setting makes them."""

        def make(to: Path) -> Artifact:
            with self._folder("base") as base, self._folder("fp32") as floats:
                onnx_opponents.built(self.model.folder, floats, "shared_embeddings=false", precision="fp32")
                given = self._built(name, base), to, algorithm, self._stock_calibration.tokens
                return onnx_opponents.with_own_quantiser(floats / "model.onnx", *given)

        return self.opponent(f"{algorithm}; embedding and head: {name}", "hand-made", "onnx", make)


def source_code(folder: Path) -> Path:
    """Write the beginnings of some of Python's own modules into one file."""
    library = Path(sysconfig.get_path("stdlib"))
    path = folder / "code.txt"
    path.write_text("\n\n".join((library / f"{name}.py").read_text("utf-8")[:8000] for name in CODE), "utf-8")
    return path
