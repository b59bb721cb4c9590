"""The whole job, one call a stage: a model in, a proved bundle for a device out."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from exporter.bundle.manifest import Manifest
from exporter.bundle.transport import code_beside
from exporter.bundle.write import staging_folder, write_bundle
from exporter.calibrate.evaluation_statistics import EvaluationStatistics
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress.allocate import with_predicted_kl
from exporter.compress.compressed import CompressedModel, propagation_text
from exporter.foundation.allocator import keep_freed_memory
from exporter.foundation.cache import telling
from exporter.foundation.errors import ExporterError, RequestError
from exporter.foundation.progress import Progress, silent
from exporter.model.folder import require_new, save_folder
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.job import Job
from exporter.planning.outline import Outline, needs_of, outline
from exporter.planning.plan import Plan
from exporter.planning.resolve import ResolvedJob, resolve
from exporter.planning.step import Draft, Observe
from exporter.prove.arm64 import settle
from exporter.prove.emulation import Emulation, emulate
from exporter.prove.proof import prove
from exporter.prove.source_check import check_source
from exporter.prove.text_checks import preview_text
from exporter.report.data import Measurements, Report
from exporter.stages.assemble_report import describe, header, write_documents
from exporter.stages.predicted_times import stage_seconds
from exporter.stages.sampled_text import sampled_windows, sampling_notes
from exporter.stages.stage_times import Stages
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Target


@dataclass(frozen=True)
class Bundle:
    """What `build` made.

    Attributes:
        path: Its folder.
        manifest: manifest.json.
        plan: plan.json.
        report: report.json.
        measurements: measurements.json.
    """

    path: Path
    manifest: Manifest
    plan: Plan
    report: Report
    measurements: Measurements


def plan(job: Job) -> Outline:
    """Return what `build` would do and need; reads no weights.

    Raises:
        ExporterError: what `build` would refuse; see `exporter.foundation.errors`.
    """
    with open_model(job.source) as model:
        resolved, draft = drafted(job, model)
        needs = needs_of(resolved, draft.decisions)
        return outline(resolved, draft, needs, stage_seconds(resolved, draft, needs.file))


def drafted(job: Job, model: Model) -> tuple[ResolvedJob, Draft]:
    """Return the job with everything that its names stand for, and its decisions before statistics.

    Raises:
        InputError: the tokenizer cannot be used, or the target cannot store it.
        RequestError: see `resolve` and `ResolvedJob.draft`.
    """
    resolved = resolve(job, model)
    draft = resolved.draft()
    preview = preview_text(resolved.original, resolved.target)
    return resolved.with_text(preview.checks, preview.notes), draft


def build(job: Job, progress: Progress = silent) -> Bundle:
    """Compress, lower, prove and pack a model for a device.

    Args:
        job: What is asked for.
        progress: Called with a stage's name, steps done and their total.

    Raises:
        InputError: the source changed meanwhile; or see below.
        ExporterError: see `exporter.foundation.errors`; nothing half-written stays.
    """
    if job.output is None:
        raise RequestError("no output folder was named", next_step="name one with -o")
    if job.save_pruned is not None:
        require_new(job.save_pruned)
    keep_freed_memory()
    stages = Stages()
    with ExitStack() as opened:
        opened.enter_context(telling(partial(progress, "wait for another job", 0, 1)))
        with stages.stage("open"):
            model = opened.enter_context(open_model(job.source))
        with stages.stage("plan"):
            resolved, draft = drafted(job, model)
        staging = opened.enter_context(staging_folder(job.output, needs_of(resolved, draft.decisions).disk))
        return _build(resolved, draft, staging, job.output, stages, progress)


def _build(
    resolved: ResolvedJob, draft: Draft, staging: Path, output: Path, stages: Stages, progress: Progress
) -> Bundle:
    job, target = resolved.job, resolved.target
    with stages.stage("calibration text"):
        calibration, evaluation = texts(resolved, progress)
        original = resolved.original.noting(sampling_notes(resolved.original, calibration, evaluation))
        resolved = replace(resolved, original=original)
    with stages.stage("check the source"):
        sourced = check_source(original, evaluation.tokens, job.threads, staging, progress)

    def observe(model: Model, text: Windows = calibration) -> Statistics:
        return collect(model, text, job.seed, partial(progress, "statistics: layers"))

    if resolved.recipe.rewriting:
        with stages.stage("rewrite"):
            resolved = rewritten(resolved, observe, progress)
            draft = resolved.draft()
    encoding = resolved.encoding
    with stages.stage("statistics"):
        given = encoding.coordinates(target, resolved.model, observe(resolved.model), draft.decisions)
    with stages.stage("allocate"):
        decisions, notes = resolved.decided(draft, given, partial(progress, "allocate: matrices"))
        methods = encoding.methods(decisions, given, partial(progress, "steps: matrices"))
    with stages.stage("predict"):
        seen = given.of(observe(resolved.model, evaluation.spread(resolved.prediction_windows)))
        decisions = with_predicted_kl(
            decisions, given, EvaluationStatistics(given.statistics, seen), resolved.effort, methods,
            partial(progress, "predict: matrices"),
        )  # fmt: skip
    with stages.stage("compress and lower"):
        compressed = CompressedModel(
            original,
            decisions,
            given.statistics,
            resolved.effort,
            partial(progress, "compress: matrices"),
            given.model,
            encoding.alternation,
            methods,
            propagation_text(resolved.effort, decisions, calibration),
        )
        artifact = lowered(compressed, target, draft, staging / "model")
    emulation = Emulation()
    if job.emulate:
        with stages.stage("emulate: Arm instructions"):
            emulation += settle(artifact, resolved.device, evaluation.tokens, progress)
    with stages.stage("prove"):
        proof = prove(target, artifact, compressed, evaluation.tokens, job.context, job.threads, progress)
    if job.emulate:
        with stages.stage("emulate"):
            emulation += emulate(artifact, resolved.device, evaluation.tokens, job.context, progress)
    coded = None
    if resolved.recipe.transport is not None:
        with stages.stage("code for transport"):
            coded = code_beside(artifact.weights, resolved.recipe.transport, progress)
    plan = resolved.plan(decisions, tuple(dict.fromkeys((*notes, *emulation.notes))), calibration, evaluation)
    proof = replace(proof, checks=sourced + proof.checks)
    report, measurements = describe(
        resolved, plan, resolved.scheme(draft), compressed, artifact, proof, emulation, coded, stages
    )
    write_documents(staging, plan, report, measurements, proof.self_test)
    original.require_unchanged()
    manifest = write_bundle(staging, output, header(job, original, report))
    return Bundle(output, manifest, plan, report, measurements)


def rewritten(resolved: ResolvedJob, observe: Observe, progress: Progress) -> ResolvedJob:
    """Return the job with the model that the rewriting steps give, which is saved where the job says so."""
    smaller = resolved.recipe.rewritten(resolved.original, observe, partial(progress, "rewrite"))
    if resolved.job.save_pruned is not None:
        save_folder(smaller, resolved.job.save_pruned)
    return resolved.with_rewritten(smaller)


def lowered(compressed: CompressedModel, target: Target, draft: Draft, folder: Path) -> Artifact:
    """Return the artifact, written into a new folder.

    Raises:
        ExporterError: the model files take more bytes than they may.
    """
    folder.mkdir()
    artifact = target.lower(compressed, draft.scheme, folder)
    if artifact.file_bytes > draft.most_file_bytes:
        raise ExporterError(
            "the model files exceed their budget", got=artifact.file_bytes, expected=draft.most_file_bytes
        )
    return artifact


def texts(resolved: ResolvedJob, progress: Progress) -> tuple[Windows, Windows]:
    """Return calibration and evaluation windows: the user's texts, or text that the model samples itself.

    Raises:
        InputError: the job repeats a plan that was made on another text.
    """
    job, model, windows = resolved.job, resolved.original, resolved.effort.calibration_windows
    tokenizer = load_tokenizer(model.folder, model.architecture.vocab)
    calibration = evaluation = None
    if job.calibration is not None:
        calibration = spread_windows(job.calibration, tokenizer, windows, job.window)
    if job.evaluation is not None:
        evaluation = file_windows(job.evaluation, tokenizer, job.evaluation_windows, job.window)
    if calibration is None or evaluation is None:
        sampled = sampled_windows(job, windows, model, tokenizer, progress)
        calibration, evaluation = calibration or sampled[0], evaluation or sampled[1]
    if job.repeats is not None:
        job.repeats.require_text("calibration", calibration)
        job.repeats.require_text("evaluation", evaluation)
    return calibration, evaluation
