"""Compiles and runs the pipeline on Qualcomm's emulator; all of it in a `Child` whose working directory is its own.

Graphs are opened by relative paths: compiled binaries name what the path of their graph hashes to, and would otherwise
differ from folder to folder. Qualcomm's libraries also read a file `libnative_tls.conf` of the working directory.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from exporter.formats.format import Float32
from exporter.targets.onnx.runtime import EXACT
from exporter.targets.onnx.session import CONFIGURATION, genai_generator, session_options
from exporter.targets.onnx_qdq.npu import qualcomm
from exporter.targets.onnx_qdq.npu.configuration import compiled_file, provider_options
from exporter.targets.onnx_qdq.npu.stages import (
    CONTEXT,
    EMBEDDINGS,
    HEAD,
    HIDDEN_IN,
    HIDDEN_OUT,
    IDS,
    LOGITS,
    PAST,
    PAST_LENGTH,
    PRESENT,
    TOTAL_LENGTH,
    graph_file,
)

PRODUCT = "MatMul"


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a stage run.

    Attributes:
        placed: Nodes on the neural processor.
        products: Matrix multiplications among them.
        others: Operator -> number of nodes on the CPU.
    """

    placed: int
    products: int
    others: dict[str, int]


def compiled(stage: str, soc_number: int) -> Placement:
    """Compile a stage of the working directory: its binaries, and the graph that refers to them, are written beside it.

    The binaries hold the stage's weights. Those of two stages are not shared: the emulator crashes on shared ones, so
    they could not be checked.
    """
    qualcomm.register(onnxruntime)
    entries = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "0",
        "ep.context_file_path": compiled_file(stage),
        "session.record_ep_graph_assignment_info": "1",
    }
    session = _on_processor(graph_file(stage), soc_number, 1, entries)
    placed, products, others = 0, 0, Counter[str]()
    for part in session.get_provider_graph_assignment_info():
        kinds = [node.op_type for node in part.get_nodes()]
        if part.ep_name == qualcomm.PROVIDER:
            placed += len(kinds)
            products += kinds.count(PRODUCT)
        else:
            others.update(kinds)
    return Placement(placed, products, dict(others))


def _on_processor(path: str, soc_number: int, threads: int, entries: dict[str, str]) -> onnxruntime.InferenceSession:
    options = session_options(threads, entries)
    devices = [one for one in onnxruntime.get_ep_devices() if one.ep_name == qualcomm.PROVIDER]
    options.add_provider_for_devices(devices, provider_options(soc_number))
    return onnxruntime.InferenceSession(path, options)


def _on_cpu(path: str, threads: int) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, session_options(threads, EXACT), providers=["CPUExecutionProvider"])


class WindowedLogits:
    """The stages that read prompts, in plain onnxruntime and from the working directory; the layers on the emulator.

    Args:
        soc_number: The SoC to emulate.
        threads: Threads to compute with.
    """

    def __init__(self, soc_number: int, threads: int) -> None:
        qualcomm.register(onnxruntime)
        self._embeddings, self._head = (_on_cpu(graph_file(stage), threads) for stage in (EMBEDDINGS, HEAD))
        self._layers = _on_processor(compiled_file(CONTEXT), soc_number, threads, {})
        self._past = {
            one.name: np.zeros([side if isinstance(side, int) else self._width() for side in one.shape], np.float32)
            for one in self._layers.get_inputs()
            if one.name.startswith(PAST)
        }
        self._read = 0

    def _width(self) -> int:
        settings = json.loads(Path(CONFIGURATION).read_text(encoding="utf-8"))
        return int(settings["model"]["decoder"]["head_size"])

    def read(self, tokens: list[int]) -> Float32:
        """Process the next window of tokens; return their logits, float32 [tokens, vocab]."""
        (hidden,) = self._embeddings.run([HIDDEN_IN], {IDS: np.array([tokens], np.int64)})
        self._read += len(tokens)
        length = next(iter(self._past.values())).shape[2]
        lengths = {
            PAST_LENGTH: np.array([[self._read - 1]], np.int32),
            TOTAL_LENGTH: np.array([length], np.int32),
        }
        presents = [PRESENT + name.removeprefix(PAST) for name in self._past]
        last, *made = self._layers.run([HIDDEN_OUT, *presents], {HIDDEN_IN: hidden, **lengths, **self._past})
        self._past = dict(zip(self._past, made, strict=True))
        (logits,) = self._head.run([LOGITS], {HIDDEN_OUT: last})
        found: Float32 = logits[0]
        return found


def generated(prompt: list[int], count: int, emulated: bool) -> list[int]:
    """Return greedy tokens of a folder for onnxruntime-genai, the working directory, by a generator of their own.

    A generator that has generated gives other tokens after more are appended (onnxruntime-genai 0.18), so each turn of
    a chat needs a new one.

    Args:
        prompt: The prompt's tokens.
        count: Number of tokens.
        emulated: Run the stages that the settings place on the neural processor on the emulator.
    """
    import onnxruntime_genai

    config = onnxruntime_genai.Config(".")
    if emulated:
        qualcomm.register(onnxruntime_genai)
    else:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": EXACT}}}))
    model = onnxruntime_genai.Model(config)
    # The pipeline's caches have a fixed length, and its text includes the padding.
    length = json.loads(Path(CONFIGURATION).read_text(encoding="utf-8"))["model"]["context_length"]
    generator = genai_generator(model, length, min_length=length)
    generator.append_tokens(np.array([prompt], np.int32))
    made = []
    for _ in range(count):
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    return made
