"""The artifact on Qualcomm's emulator; see `exporter.targets.npu.Npu`.

Each task runs in a child of its own with a working directory of its own, on the artifact's disk, into which the files
that it needs are hard-linked.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from exporter.child.process import Child
from exporter.device.neural import NeuralProcessor
from exporter.formats.format import Float32
from exporter.formats.group import Decision
from exporter.foundation.cache import replacing
from exporter.foundation.errors import RequestError, RuntimeCrashError
from exporter.foundation.fitted import fitted_value
from exporter.model.model import Model
from exporter.targets.artifact import Artifact, share
from exporter.targets.npu import Advance, Compiled
from exporter.targets.onnx.settings import CONFIGURATION
from exporter.targets.onnx_qdq.npu import FOLDER, folder, qualcomm
from exporter.targets.onnx_qdq.npu.configuration import to_text, with_compiled
from exporter.targets.onnx_qdq.npu.emulator import Placement, WindowedLogits, compiled, generated
from exporter.targets.onnx_qdq.npu.stages import CONTEXT, LAYER_STAGES, WINDOW, graph_file

# Time limits: fixed, and bytes of weights times tokens per second. The emulator takes some 24 s for a window of the
# 135M model on two cores, and a third of that for a single token.
FIXED_S, COMPILED_BYTES_PER_S, EMULATED_BYTES_PER_S = 300.0, 1e5, 2e5
# The compiler holds the weights several times.
FIXED_BYTES, TIMES_THE_FILE = 4 << 30, 24
THREADS = 2


class QualcommNpu:
    """Decoders on Qualcomm's emulator of the Hexagon tensor processor."""

    title = "Qualcomm's host emulator"
    terms = qualcomm.TERMS
    licence = f"{qualcomm.PACKAGE} {qualcomm.VERSION}: {qualcomm.LICENCE}"
    unseen = (
        "an emulator does not show whether the device's driver accepts binaries of this version, whether values leave "
        "the range of float16, or any speed; binaries that share their weights crash it, so each stage has its own"
    )

    def hindrance(self, processor: NeuralProcessor, model: Model) -> str | None:
        """Return why a model has no pipeline for a processor; None if it has."""
        return folder.hindrance(processor, model)

    def require_installed(self) -> None:
        """Require `onnxruntime-qnn`."""
        qualcomm.require_installed()

    def products(self, model: Model) -> int:
        """Return the number of the layers' matrices: each is multiplied by itself."""
        return sum(group.layer is not None for group in model.groups())

    def compiled_bytes(self, decisions: Sequence[Decision]) -> int:
        """Return the bytes of both stages, which each hold the layers' weights."""
        layers = sum(one.stored_bytes for one in decisions if one.group.layer is not None)
        return int(fitted_value("exporter.targets.onnx_qdq", "compiled_copies") * layers)

    def compile(self, artifact: Artifact, processor: NeuralProcessor) -> Compiled:
        """Compile context and iterator, and make the pipeline's settings name what is compiled."""
        number = _number(processor)
        place, started = artifact.folder / FOLDER, time.perf_counter()
        seconds = FIXED_S + artifact.file_bytes / COMPILED_BYTES_PER_S
        found: dict[str, Placement] = {}
        files: list[Path] = []
        data = artifact.weights[1]
        for stage in LAYER_STAGES:
            with _child(artifact, [place / graph_file(stage), data]) as (child, scratch):
                found[stage] = child.run(compiled, seconds, stage, number)
                made = sorted(set(scratch.iterdir()) - {scratch / graph_file(stage), scratch / data.name})
                files += [Path(shutil.move(path, place / path.name)) for path in made]
        settings = place / CONFIGURATION
        changed = with_compiled(json.loads(settings.read_text(encoding="utf-8")), LAYER_STAGES)
        with replacing(settings) as partial:
            partial.write_text(to_text(changed), encoding="utf-8")
        context = found[CONTEXT]
        nodes = context.placed + sum(context.others.values())
        least = min(placement.products for placement in found.values())
        return Compiled(tuple(files), nodes, context.placed, least, context.others, time.perf_counter() - started)

    def logits(self, artifact: Artifact, processor: NeuralProcessor, tokens: list[int], advance: Advance) -> Float32:
        """Return the logits after each token, float32 [tokens, vocab], of the stage that reads prompts."""
        if not tokens or len(tokens) % WINDOW:
            raise RequestError("whole windows of tokens are read", got=len(tokens), expected=f"a multiple of {WINDOW}")
        windows = [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]
        seconds, parts = _seconds(artifact, WINDOW), []
        with _child(artifact, _pipeline_files(artifact)) as (child, _):
            child.make(WindowedLogits, seconds, _number(processor), THREADS)
            child.ready()
            for done, window in enumerate(windows):
                advance(done, len(windows))
                parts.append(child.call(WindowedLogits.read, seconds, window))
        advance(len(windows), len(windows))
        logits = np.concatenate(parts)
        if logits.ndim != 2 or len(logits) != len(tokens):
            raise RuntimeCrashError("the pipeline gave another number of logits", got=list(logits.shape))
        return logits

    def generate(self, artifact: Artifact, emulated: bool, prompt: list[int], count: int) -> list[int]:
        """Return greedy tokens in onnxruntime-genai."""
        files = (
            _pipeline_files(artifact) if emulated else [path for path in artifact.folder.iterdir() if path.is_file()]
        )
        seconds = _seconds(artifact, len(prompt) + WINDOW * (1 + count))
        with _child(artifact, files) as (child, scratch):
            if not emulated:
                (scratch / FOLDER).mkdir()
                share(artifact.weights[1], scratch / FOLDER / artifact.weights[1].name)
            return child.run(generated, seconds, prompt, count, emulated)


def _number(processor: NeuralProcessor) -> int:
    if processor.soc_number is None:
        raise RequestError("the profile names no number of the SoC", where=processor.soc)
    return processor.soc_number


def _seconds(artifact: Artifact, tokens: int) -> float:
    return FIXED_S + artifact.file_bytes * tokens / WINDOW / EMULATED_BYTES_PER_S


def _pipeline_files(artifact: Artifact) -> list[Path]:
    return [path for path in (artifact.folder / FOLDER).iterdir() if path.is_file()]


@contextmanager
def _child(artifact: Artifact, files: Sequence[Path]) -> Iterator[tuple[Child, Path]]:
    """Yield a child and its working directory, which holds these files alone."""
    memory = FIXED_BYTES + TIMES_THE_FILE * artifact.file_bytes
    with TemporaryDirectory(prefix=".npu-", dir=artifact.folder.parent) as made:
        scratch = Path(made)
        for path in files:
            share(path, scratch / path.name)
        with Child(QualcommNpu.title, memory, scratch) as child:
            yield child, scratch


NPU = QualcommNpu()
