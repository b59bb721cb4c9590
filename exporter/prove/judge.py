"""Runs an artifact in a second runtime, written by others, and compares: the stage that `--judge` adds.

What the artifact's own runtime and this exporter both get wrong, no other check can see. The second runtime reads the
files by code of its own. It computes in float32, so its distance from the float model with the artifact's weights is
that of sums in another order, and a limit far below any rounding of activations can be kept.
"""

from dataclasses import replace
from functools import partial

import numpy as np

from exporter.child.process import Child
from exporter.foundation.cache import scratch_folder
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.prove.accuracy import Float64, Logits, Reference, distance, divergence
from exporter.targets.artifact import Artifact
from exporter.targets.judge import Judge, judge_of
from exporter.targets.opened import deadline_s, memory_bytes

# Positions to compare: a fault of files or graph shows at all of them.
POSITIONS = 1024


def judge(
    artifact: Artifact, own: Reference, in_own_runtime: Logits, threads: int, progress: Progress = silent
) -> Check:
    """Compare an artifact in the second runtime with the float model of its weights, and with its own runtime.

    Args:
        artifact: The artifact.
        own: The float model with the artifact's weights; some of its windows are used.
        in_own_runtime: Returns the logits of the artifact in its own runtime; see `distances`.
        threads: Threads of the second runtime.
        progress: Called with the name of the step, steps done and their total.

    Returns:
        The check `judge.` and the runtime's name, `not run` with the reason if that runtime does not read the artifact.

    Raises:
        RequestError: there is no second runtime for the target, or it is not installed.
    """
    runtime = judge_of(artifact.target)
    name = f"judge.{runtime.name}"
    length = own.tokens.shape[1]
    some = replace(own, tokens=own.tokens[: -(-POSITIONS // (length - 1 - length // 2))])
    apart: list[Float64] = []
    with (
        scratch_folder(artifact.folder.parent, ".judge") as scratch,
        Child(runtime.title, memory_bytes(artifact, length)) as child,
    ):

        def logits(tokens: list[int], first: int) -> np.ndarray:
            got = child.call(Judge.logits, deadline_s(artifact.file_bytes, len(tokens)), tokens, first)
            apart.append(divergence(in_own_runtime(tokens, first)[:-1], got[:-1]))
            return got

        try:
            child.make(runtime, deadline_s(artifact.file_bytes, length), artifact, scratch, threads)
            most_kl = child.call(Judge.most_kl, deadline_s(artifact.file_bytes, 0))
            version = child.call(Judge.version, deadline_s(artifact.file_bytes, 0))
            found = distance(some, logits, partial(progress, f"prove: windows in {runtime.title}"))
        except (InputError, RuntimeCrashError) as error:
            return Check(name=name, status="not run", detail=str(error).removesuffix("."))
    return Check(
        name=name,
        status="passed" if found.kl_mean <= most_kl else "failed",
        detail=(
            f"KL {found.kl_mean:.1e} of the artifact in {runtime.title} {version} against the float model of its "
            f"weights, over {found.tokens} tokens; KL {np.concatenate(apart).mean():.2g} against its own runtime, "
            "that one's rounding included"
        ),
        value=found.kl_mean,
        limit=most_kl,
        unit="nats",
    )
