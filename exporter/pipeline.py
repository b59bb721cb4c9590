"""The whole job, one call a stage: a model in, a proved bundle for a device out."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.budget import Budget, decide_within, feasible_budget, foretell, likely
from exporter.bundle.manifest import Manifest
from exporter.bundle.transport import code_beside
from exporter.bundle.write import staging_folder, write_bundle
from exporter.calibrate.statistics import collect
from exporter.calibrate.text import Windows, file_windows
from exporter.compress.allocate import Storage
from exporter.compress.compressed import CompressedModel
from exporter.documents import describe, header, write_documents
from exporter.effort import effort
from exporter.errors import ExporterError, RequestError
from exporter.forecast import stage_seconds
from exporter.job import Job, Progress, silent
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.plan import Plan, make_plan, with_decisions
from exporter.report.data import Measurements, Report
from exporter.sampling import sampled_windows
from exporter.stages import Stages, give_back_freed_memory
from exporter.validate.proof import prove


@dataclass(frozen=True)
class Bundle:
    """What `build` made."""

    path: Path
    manifest: Manifest
    report: Report
    measurements: Measurements


def plan(job: Job) -> tuple[Plan, dict[str, float]]:
    """Say what `build` would do and need, and the seconds of each stage; reads no weights."""
    with open_model(job.source) as model:
        job = fitted(job, model)
        planned, budget = planned_within(job, model)
        storages = [Storage.of(one) for one in planned.decisions] if budget is None else budget.storages
        return planned, stage_seconds(model, job, planned.decisions, storages, planned.file_bytes)


def planned_within(job: Job, model: Model) -> tuple[Plan, Budget | None]:
    """Return the plan, and the budget that the job names; decisions within one are the likely ones."""
    planned = make_plan(model, job)
    budget = feasible_budget(job, model, planned.target, planned.device)
    if budget is not None:
        planned = with_decisions(planned, model, job, likely(budget, model, planned.method), budget.scheme)
    return planned, budget


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


def build(job: Job, progress: Progress = silent) -> Bundle:
    """Compress, lower, prove and pack a model for a device.

    Args:
        job: What is asked for.
        progress: Called with a stage's name, steps done and their total.

    Raises:
        ExporterError: see `exporter.errors`; nothing half-written stays.
    """
    output = job.output
    if output is None:
        raise RequestError("no output folder was named", next_step="name one with -o")
    give_back_freed_memory()
    stages = Stages()
    with ExitStack() as opened:
        with stages.stage("open"):
            model = opened.enter_context(open_model(job.source))
        job = fitted(job, model)
        with stages.stage("plan"):
            planned, budget = planned_within(job, model)
        staging = opened.enter_context(staging_folder(output, planned.disk_bytes))
        return _build(job, model, planned, budget, staging, stages, progress)


def _build(
    job: Job, model: Model, planned: Plan, budget: Budget | None, staging: Path, stages: Stages, progress: Progress
) -> Bundle:
    target = planned.target
    with stages.stage("calibration text"):
        calibration, evaluation = texts(job, model, progress)
    with stages.stage("statistics"):
        statistics = collect(
            model, calibration, job.seed, lambda done, total: progress("statistics: layers", done, total)
        )
        rewritten = planned.coordinates(model, statistics)
    with stages.stage("allocate"):
        methods = planned.methods(rewritten, progress)
        if budget is None:
            decisions = foretell(planned.decisions, job, rewritten.model, rewritten.statistics, progress, methods)
        else:
            decisions = decide_within(budget, job, rewritten.model, planned.method, rewritten.statistics, progress)
        planned = replace(planned, decisions=decisions)
    with stages.stage("compress and lower"):
        (staging / "model").mkdir()
        compressed = CompressedModel(
            model,
            planned.decisions,
            rewritten.statistics,
            job.effort_level,
            lambda done, total: progress("compress: matrices", done, total),
            rewritten.model,
            planned.turns,
            methods,
        )
        artifact = target.lower(compressed, planned.type, staging / "model")
        if budget is not None and artifact.file_bytes > budget.file_bytes:
            raise ExporterError(
                "the model files exceed their budget", got=artifact.file_bytes, expected=budget.file_bytes
            )
    with stages.stage("prove"):
        proof = prove(target, artifact, compressed, evaluation.tokens, job.context, job.threads, progress)
    coded = None
    if planned.transport is not None:
        with stages.stage("code for transport"):
            coded = code_beside(artifact.weights, planned.transport, progress)
    report, measurements = describe(job, planned, compressed, artifact, proof, coded, calibration, evaluation, stages)
    write_documents(staging, report, measurements, proof.self_test)
    assert job.output is not None
    manifest = write_bundle(staging, job.output, header(job, model, report))
    return Bundle(job.output, manifest, report, measurements)


def texts(job: Job, model: Model, progress: Progress) -> tuple[Windows, Windows]:
    """Return calibration and evaluation windows: the user's texts, or text that the model samples itself."""
    tokenizer = load_tokenizer(model.folder)

    def read(file: Path | None, count: int) -> Windows | None:
        return None if file is None else file_windows(file, tokenizer, count, job.window)

    calibration = read(job.calibration, job.effort_level.calibration_windows)
    evaluation = read(job.evaluation, job.evaluation_windows)
    if calibration is None or evaluation is None:
        sampled = sampled_windows(job, model, tokenizer, progress)
        calibration, evaluation = calibration or sampled[0], evaluation or sampled[1]
    return calibration, evaluation
