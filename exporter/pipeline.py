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
from exporter.compress.compressed import CompressedModel, propagation_text
from exporter.compress.effort import effort
from exporter.foundation.allocator import keep_freed_memory
from exporter.foundation.cache import telling
from exporter.foundation.errors import ExporterError, RequestError
from exporter.foundation.progress import Progress, silent
from exporter.model.folder import require_new, save_folder
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.plan.budget import Budget, decide_within, feasible_budget, predict_decisions, surrogate_decisions
from exporter.plan.job import Job
from exporter.plan.plan import Plan, make_plan, with_decisions, with_model, with_text
from exporter.plan.step import Observe
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

# The context of Llama 3.1 to 3.3: what most models for long texts were made for.
MOST_POSITIONS_UNASKED = 131_072


@dataclass(frozen=True)
class Bundle:
    """What `build` made."""

    path: Path
    manifest: Manifest
    report: Report
    measurements: Measurements


def plan(job: Job) -> tuple[Plan, dict[str, float]]:
    """Say what `build` would do and need, and the seconds of each stage; reads no weights."""
    with open_model(job.source) as opened:
        job = fitted(job, opened)
        model = for_context(opened, job.context)
        planned, budget = planned_within(job, model)
        return planned, stage_seconds(planned, job, [] if budget is None else budget.storages)


def planned_within(job: Job, model: Model) -> tuple[Plan, Budget | None]:
    """Return the plan for a source, within the limits that the job names; reads no weights.

    Raises:
        InputError: the tokenizer cannot be used, or the target cannot carry it.
        RequestError: see `make_plan` and `feasible_budget`.
    """
    planned = make_plan(model, job)
    preview = preview_text(model, planned.target)
    return within_limits(with_text(planned, preview.checks, preview.notes), job)


def within_limits(planned: Plan, job: Job) -> tuple[Plan, Budget | None]:
    """Return the plan, and the budget that the job names; decisions within one are estimated from the formats alone."""
    budget = feasible_budget(job, planned)
    if budget is not None:
        planned = with_decisions(
            planned, job, surrogate_decisions(budget, planned.model, planned.method), budget.scheme
        )
    return planned, budget


def rewritten_within(planned: Plan, job: Job, observe: Observe, progress: Progress) -> tuple[Plan, Budget | None]:
    """Return the plan for what the recipe's steps make of the source, which is saved where the job says so."""
    smaller = planned.recipe.rewritten(planned.original, observe, partial(progress, "rewrite"))
    if job.save_pruned is not None:
        save_folder(smaller, job.save_pruned)
    return within_limits(with_model(planned, job, smaller, "measured"), job)


def fitted(job: Job, model: Model) -> Job:
    """Return the job with windows no longer than the model's context.

    Raises:
        RequestError: the context asked for is longer than the model's, or there is no such effort.
    """
    effort(job.effort)
    longest = model.architecture.context_length
    if job.context > longest:
        raise RequestError("the context is longer than the model's", got=job.context, expected=f"at most {longest}")
    return replace(job, window=min(job.window, longest))


def for_context(model: Model, context: int) -> Model:
    """Return the model for no more positions than are usual, or than are asked for: tables of positions take room."""
    longest, bounded = model.architecture.context_length, max(context, MOST_POSITIONS_UNASKED)
    if longest <= bounded:
        return model
    note = f"the artifact is made for {bounded:,} of the model's {longest:,} positions; --context asks for more"
    architecture = replace(model.architecture, context_length=bounded)
    return replace(model, architecture=architecture, warnings=(*model.warnings, note))


def build(job: Job, progress: Progress = silent) -> Bundle:
    """Compress, lower, prove and pack a model for a device.

    Args:
        job: What is asked for.
        progress: Called with a stage's name, steps done and their total.

    Raises:
        InputError: the source changed meanwhile; or see below.
        ExporterError: see `exporter.foundation.errors`; nothing half-written stays.
    """
    output = job.output
    if output is None:
        raise RequestError("no output folder was named", next_step="name one with -o")
    keep_freed_memory()
    stages = Stages()
    with ExitStack() as opened:
        opened.enter_context(telling(partial(progress, "wait for another job", 0, 1)))
        with stages.stage("open"):
            model = opened.enter_context(open_model(job.source))
        job = fitted(job, model)
        model = for_context(model, job.context)
        if job.save_pruned is not None:
            require_new(job.save_pruned)
        with stages.stage("plan"):
            planned, budget = planned_within(job, model)
        staging = opened.enter_context(staging_folder(output, planned.disk_bytes))
        return _build(job, planned, budget, staging, stages, progress)


def _build(job: Job, planned: Plan, budget: Budget | None, staging: Path, stages: Stages, progress: Progress) -> Bundle:
    original, target = planned.original, planned.target
    with stages.stage("calibration text"):
        calibration, evaluation = texts(job, original, progress)
        original = original.noting(sampling_notes(original, calibration, evaluation))
    with stages.stage("check the source"):
        sourced = check_source(original, evaluation.tokens, job.threads, staging, progress)

    def observe(model: Model, text: Windows = calibration) -> Statistics:
        return collect(model, text, job.seed, partial(progress, "statistics: layers"))

    if planned.recipe.rewriting:
        with stages.stage("rewrite"):
            planned, budget = rewritten_within(planned, job, observe, progress)
    with stages.stage("statistics"):
        rewritten = planned.coordinates(observe(planned.model))
    with stages.stage("allocate"):
        methods = planned.methods(rewritten, progress)
        decisions, remarks = planned.decisions, planned.remarks
        if budget is not None:
            decisions, remarks = decide_within(
                budget, job, rewritten.model, planned.method, rewritten.statistics, progress
            )
    with stages.stage("predict"):
        met = observe(planned.model, evaluation.spread(job.prediction_windows))
        elsewhere = EvaluationStatistics(rewritten.statistics, rewritten.of(met))
        decisions = predict_decisions(decisions, job, rewritten.model, elsewhere, progress, methods)
        planned = replace(planned, decisions=decisions, remarks=remarks)
    with stages.stage("compress and lower"):
        (staging / "model").mkdir()
        compressed = CompressedModel(
            original,
            planned.decisions,
            rewritten.statistics,
            job.effort_level,
            partial(progress, "compress: matrices"),
            rewritten.model,
            planned.recipe.alternation,
            methods,
            propagation_text(job.effort_level, planned.decisions, calibration),
        )
        artifact = target.lower(compressed, planned.type, staging / "model")
        if budget is not None and artifact.file_bytes > budget.file_bytes:
            raise ExporterError(
                "the model files exceed their budget", got=artifact.file_bytes, expected=budget.file_bytes
            )
    emulation = Emulation()
    if job.emulate:
        with stages.stage("emulate: Arm instructions"):
            emulation += settle(artifact, planned.device, evaluation.tokens, progress)
    with stages.stage("prove"):
        proof = prove(target, artifact, compressed, evaluation.tokens, job.context, job.threads, progress)
    if job.emulate:
        with stages.stage("emulate"):
            emulation += emulate(artifact, planned.device, evaluation.tokens, job.context, progress)
    coded = None
    if planned.transport is not None:
        with stages.stage("code for transport"):
            coded = code_beside(artifact.weights, planned.transport, progress)
    proof = replace(proof, checks=sourced + proof.checks)
    report, measurements = describe(
        job, planned, compressed, artifact, proof, emulation, coded, calibration, evaluation, stages
    )
    write_documents(staging, report, measurements, proof.self_test)
    original.require_unchanged()
    assert job.output is not None
    manifest = write_bundle(staging, job.output, header(job, original, report))
    return Bundle(job.output, manifest, report, measurements)


def texts(job: Job, model: Model, progress: Progress) -> tuple[Windows, Windows]:
    """Return calibration and evaluation windows: the user's texts, or text that the model samples itself."""
    tokenizer = load_tokenizer(model.folder, model.architecture.vocab)
    calibration = evaluation = None
    if job.calibration is not None:
        calibration = spread_windows(job.calibration, tokenizer, job.effort_level.calibration_windows, job.window)
    if job.evaluation is not None:
        evaluation = file_windows(job.evaluation, tokenizer, job.evaluation_windows, job.window)
    if calibration is None or evaluation is None:
        sampled = sampled_windows(job, model, tokenizer, progress)
        calibration, evaluation = calibration or sampled[0], evaluation or sampled[1]
    return calibration, evaluation
