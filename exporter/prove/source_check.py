"""Checks that a GGUF source was read as the right model, with llama.cpp as the reference for the exporter's reader."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.calibrate.windows import Tokens
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.excerpt import excerpt_if_large
from exporter.model.gguf_file import open_whole
from exporter.model.model import Model
from exporter.prove.accuracy import Distance, Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.as_float import write_as_float
from exporter.targets.opened import OpenedArtifact

NAME = "source.gguf"
# Two float32 implementations of one model differ by 1e-8 at most; a missed scaling, by 1e-4 and more.
MOST_KL = 1e-6
WINDOWS = 2


def check_source(
    model: Model, tokens: Tokens, threads: int, folder: Path, progress: Progress = silent
) -> tuple[Check, ...]:
    """Compare the model as it was read with llama.cpp's computation of the file, rewritten in float32.

    Args:
        model: The source.
        tokens: Evaluation windows, int64 [windows, length]; the first ones are enough.
        threads: Threads of llama.cpp.
        folder: Has room for the file in float32, which is deleted afterwards.
        progress: Called with the name of the step, steps done and their total.

    Returns:
        The check `source.gguf`, or none if the source is no GGUF file.

    Raises:
        InputError: the two differ, or llama.cpp cannot run the file.
    """
    if model.gguf is None:
        return ()
    # Not from the cache, since the check is of this reading of the file.
    reference = Reference.of(excerpt_if_large(model), tokens[:WINDOWS], partial(progress, "check the source: layers"))
    progress("check the source: llama.cpp", 0, 1)
    found = _distance(model, model.gguf, reference, threads, folder)
    progress("check the source: llama.cpp", 1, 1)
    part = "" if excerpt_if_large(model) is model else ", first and last layer with embedding and head"
    detail = f"KL {found.kl_mean:.1e} of the file in llama.cpp, in float32{part}, against the model as it was read"
    if found.kl_mean > MOST_KL:
        raise InputError(
            "the GGUF file is not read as the model that llama.cpp runs, so no bundle is written",
            where=f"{model.gguf}: {NAME}",
            got=f"{detail}",
            expected=f"at most {MOST_KL:.0e}",
            next_step="give the model as a Hugging Face folder, and please report this with the file's name",
        )
    return (Check(name=NAME, status="passed", detail=detail, value=found.kl_mean, limit=MOST_KL, unit="nats"),)


def _distance(model: Model, path: Path, reference: Reference, threads: int, folder: Path) -> Distance:
    layers = None if excerpt_if_large(model) is model else model.decoder.layers
    with TemporaryDirectory(prefix=".source.", dir=folder) as scratch:
        written = Path(scratch, "source.gguf")
        write_as_float(open_whole(path), written, layers)
        artifact = Artifact("gguf", written.parent, (written,))
        try:
            with OpenedArtifact(artifact, reference.tokens.shape[1], threads, exact=True) as opened:
                return distance(reference, opened.logits)
        except (InputError, RuntimeCrashError) as error:
            raise InputError(
                "llama.cpp cannot run the GGUF file, so nothing tells whether it is read right",
                where=f"{path}: {NAME}",
                got=error,
                next_step="use a file that llama.cpp runs, or give the model as a Hugging Face folder",
            ) from error
