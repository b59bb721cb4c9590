"""Measurements of artifacts, each through its real runtime."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp

from exporter.calibrate.windows import Windows
from exporter.foundation.cpu import available_cores
from exporter.model.model import Model
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.opened import OpenedArtifact
from tests.benchmarks.rows import Row

THREADS = available_cores()
WINDOW = 512


def by_turns(artifacts: Sequence[Artifact], prompt: list[int], decode: int, loads: int, rounds: int) -> list[list[Any]]:
    """Time artifacts by turns, so that what else happens to the machine happens to all: timings, a list for each round.

    How fast a process is depends on where its pages lie, too, so all are loaded anew several times.
    """
    found = []
    for _ in range(loads):
        with ExitStack() as opened:
            children = [
                opened.enter_context(OpenedArtifact(one, len(prompt) + decode + 1, THREADS)) for one in artifacts
            ]
            # Until the last one is loaded, none has the cores to itself.
            for child in children:
                child.ready()
            found += [[child.measure(prompt, decode, 1) for child in children] for _ in range(rounds)]
    return found


def measured(original: Reference, artifact: Artifact, name: str, kind: str, predicted: float | None = None) -> Row:
    """Compare an artifact with the original on its windows, and print the row."""
    with OpenedArtifact(artifact, original.tokens.shape[1], THREADS) as child:
        found = distance(original, child.logits)
    row = Row(
        name, kind, artifact.target, artifact.file_bytes, found.kl_mean, found.top1_agreement, predicted,
        kl_p99=found.kl_p99, kl_p999=found.kl_p999,
    )  # fmt: skip
    print(
        f"  {kind:9} {row.target:4} {row.file_bytes:13,} bytes  KL {found.kl_mean:.3g}  99 % {found.kl_p99:.3g}  "
        f"99.9 % {found.kl_p999:.3g}  same token {row.top1:.1%}  {name}",
        flush=True,
    )
    return row


def identity(model: Model, calibration: Windows, evaluation: Windows, tools: Sequence[str]) -> dict[str, Any]:
    """Return what the figures of artifacts that some tools made of a model depend on."""
    return {
        "model": model.digest,
        "calibration": calibration.digest,
        "evaluation": evaluation.digest,
        "machine": instructions(),
        "versions": {name: version(name) for name in tools},
    }


def instructions() -> str:
    """Return the instructions that llama.cpp was compiled for here: its kernels round otherwise with others."""
    described: bytes = llama_cpp.llama_print_system_info()
    return " ".join(found for found, held in re.findall(r"(\w+) = (\d)", described.decode()) if held == "1")


@contextmanager
def removed(path: Path) -> Iterator[Path]:
    """Give the name of a folder that does not exist and is removed in the end."""
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
