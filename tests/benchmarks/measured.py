"""Measurements of artifacts, each through its real runtime."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from exporter.foundation.cpu import available_cores
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
    row = Row(name, kind, artifact.target, artifact.file_bytes, found.kl_mean, found.top1_agreement, predicted)
    print(
        f"  {kind:9} {row.target:4} {row.file_bytes:11,} bytes  KL {row.kl_mean:.4f}  {row.top1:.1%}  {name}",
        flush=True,
    )
    return row
