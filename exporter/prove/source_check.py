"""Checks that a source of one file was read as the right model, with the file's own runtime as the reference."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.calibrate.windows import Tokens
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.excerpt import excerpt_if_large, excerpt_layers
from exporter.model.model import Model
from exporter.prove.accuracy import Distance, Reference, distance
from exporter.targets.contract import load_target
from exporter.targets.facts import facts_of
from exporter.targets.opened import OpenedArtifact
from exporter.targets.sources import SourceFiles, source_files_of

WINDOWS = 2


def check_source(
    model: Model, tokens: Tokens, threads: int, folder: Path, progress: Progress = silent
) -> tuple[Check, ...]:
    """Compare the model as it was read with the computation of the file by its runtime, rewritten in float32.

    Args:
        model: The source.
        tokens: Evaluation windows, int64 [windows, length]; the first ones are enough.
        threads: Threads of the runtime.
        folder: Has room for the file in float32, which is deleted afterwards.
        progress: Called with the name of the step, steps done and their total.

    Returns:
        The check `source.gguf` for a GGUF file, or none if the source is a folder.

    Raises:
        InputError: the two differ, or the runtime cannot run the file.
    """
    if model.single_file is None:
        return ()
    files = source_files_of(model.single_file)
    runtime, name = facts_of(files.target).runtime, f"source{files.suffix}"
    most_kl = load_target(files.target).most_lowering_kl(model.decoder.family)
    # Not from the cache, since the check is of this reading of the file.
    reference = Reference.of(excerpt_if_large(model), tokens[:WINDOWS], partial(progress, "check the source: layers"))
    progress(f"check the source: {runtime}", 0, 1)
    found = _distance(model, model.single_file, files, reference, threads, folder)
    progress(f"check the source: {runtime}", 1, 1)
    part = "" if excerpt_if_large(model) is model else ", first and last layer with embedding and head"
    detail = f"KL {found.kl_mean:.1e} of the file in {runtime}, in float32{part}, against the model as it was read"
    if found.kl_mean > most_kl:
        raise InputError(
            f"the {files.kind} file is not read as the model that {runtime} runs, so no bundle is written",
            where=f"{model.single_file}: {name}",
            got=f"{detail}",
            expected=f"at most {most_kl:.0e}",
            next_step="give the model as a Hugging Face folder, and please report this with the file's name",
        )
    return (Check(name=name, status="passed", detail=detail, value=found.kl_mean, limit=most_kl, unit="nats"),)


def _distance(
    model: Model, path: Path, files: SourceFiles, reference: Reference, threads: int, folder: Path
) -> Distance:
    layers = None if excerpt_if_large(model) is model else excerpt_layers(model.decoder)
    with TemporaryDirectory(prefix=".source.", dir=folder) as scratch:
        artifact = files.in_float32(path, Path(scratch), layers)
        try:
            with OpenedArtifact(artifact, reference.tokens.shape[1], threads, exact=True) as opened:
                return distance(reference, opened.logits)
        except (InputError, RuntimeCrashError) as error:
            runtime = facts_of(files.target).runtime
            raise InputError(
                f"{runtime} cannot run the {files.kind} file, so nothing tells whether it is read right",
                where=f"{path}: source{files.suffix}",
                got=error,
                next_step=f"use a file that {runtime} runs, or give the model as a Hugging Face folder",
            ) from error
