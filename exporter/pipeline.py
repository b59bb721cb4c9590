"""The whole job, one call a stage: a model in, a proved bundle for a device out."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from exporter.bundle.manifest import Manifest
from exporter.bundle.transport import code_beside
from exporter.bundle.write import staging_folder, write_bundle, write_licences
from exporter.calibrate.evaluation_statistics import EvaluationStatistics
from exporter.calibrate.statistics import Statistics, collect, collect_together
from exporter.calibrate.windows import Tokens, Windows, file_windows, spread_windows
from exporter.compress.allocate import with_predicted_kl
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.compression import Compression, propagation_text
from exporter.compress.method import MatrixMethod
from exporter.formats.group import Decision
from exporter.foundation.allocator import keep_freed_memory
from exporter.foundation.cache import telling
from exporter.foundation.errors import ExporterError, RequestError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.folder import require_new, save_folder
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.job import Job
from exporter.planning.outline import Outline, needs_of, outline
from exporter.planning.plan import Plan
from exporter.planning.resolve import ResolvedJob, resolve
from exporter.planning.step import Draft
from exporter.prove.arm64 import settle
from exporter.prove.emulation import Emulation, emulate
from exporter.prove.npu import prove_on_npu
from exporter.prove.proof import prove
from exporter.prove.source_check import check_source
from exporter.prove.text_checks import preview_text
from exporter.report.data import Measurements, Report
from exporter.stages.assemble_report import Evidence, describe, header, write_documents
from exporter.stages.predicted_times import stage_seconds
from exporter.stages.sampled_text import sampled_windows, sampling_notes
from exporter.stages.stage_times import Stages
from exporter.targets.contract import Lowered, lower
from exporter.targets.judge import judge_of


@dataclass(frozen=True)
class Texts:
    """The windows of both texts: what statistics come from, and what accuracy is measured on."""

    calibration: Windows
    evaluation: Windows


@dataclass(frozen=True)
class Decided:
    """What statistics decided.

    Attributes:
        given: The model in the coordinates in which it is compressed, and its statistics there.
        decisions: One for each matrix.
        methods: Methods of single matrices, by name, instead of the one that the decision names.
        notes: Sentences on what other options would give.
    """

    given: Rewritten
    decisions: list[Decision]
    methods: Mapping[str, MatrixMethod]
    notes: tuple[str, ...]


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
    with open_model(job.source, job.base, job.adapter) as model:
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
    if job.judge:
        # Refused now rather than after an hour.
        judge_of(resolved.target.name)
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
    output = new_output(job)
    keep_freed_memory()
    stage = Stages()
    with ExitStack() as opened:
        opened.enter_context(telling(partial(progress, "wait for another job", 0, 1)))
        model = stage("open", opened.enter_context, open_model(job.source, job.base, job.adapter))
        resolved, draft = stage("plan", drafted, job, model)
        folder = opened.enter_context(staging_folder(output, needs_of(resolved, draft.decisions).disk))
        texts = stage("calibration text", texts_of, resolved, progress)
        resolved = with_sampling_notes(resolved, texts)
        tokens = texts.evaluation.tokens
        source = stage("check the source", check_source, resolved.original, tokens, job.threads, folder, progress)
        if resolved.recipe.rewriting:
            resolved, draft = stage("rewrite", rewritten, resolved, texts, progress)
        given, seen = stage("statistics", observed, resolved, draft, texts, progress)
        decided = stage("allocate", decide, resolved, draft, given, progress)
        decided = stage("predict", with_predictions, resolved, decided, seen, progress)
        lowered = stage("compress and lower", compress_and_lower, resolved, draft, decided, texts, folder, progress)
        evidence = gather_evidence(resolved, lowered, tokens, source, stage, progress)
        plan = resolved.plan(decided.decisions, decided.notes + evidence.notes, texts.calibration, texts.evaluation)
        scheme = resolved.scheme(draft)
        report, measurements = describe(resolved, plan, scheme, lowered, evidence, stage)
        write_documents(folder, plan, report, measurements, evidence.proof.self_test)
        write_licences(folder, model.licences)
        model.require_unchanged()
        manifest = write_bundle(folder, output, header(job, resolved.original, report))
        return Bundle(output, manifest, plan, report, measurements)


def new_output(job: Job) -> Path:
    """Return the folder of the bundle.

    Raises:
        RequestError: none is named, or a folder to write exists.
    """
    if job.output is None:
        raise RequestError("no output folder was named", next_step="name one with -o")
    if job.save_pruned is not None:
        require_new(job.save_pruned)
    return job.output


def texts_of(resolved: ResolvedJob, progress: Progress) -> Texts:
    """Return calibration and evaluation windows: the user's texts, or text that the model samples itself.

    Raises:
        InputError: the job repeats a plan that was made on another text.
    """
    job, windows = resolved.job, resolved.effort.calibration_windows
    # Of an adapter that is kept, the base is encoded without knowing of it, and both are measured together.
    encoded, measured = resolved.unrewritten, resolved.original
    tokenizer = load_tokenizer(encoded.folder, encoded.decoder.vocab)
    if job.calibration is not None:
        calibration = spread_windows(job.calibration, tokenizer, windows, job.window)
    else:
        calibration = sampled_windows(job, windows, encoded, tokenizer, progress)[0]
    tokenizer = load_tokenizer(measured.folder, measured.decoder.vocab)
    if job.evaluation is not None:
        evaluation = file_windows(job.evaluation, tokenizer, job.evaluation_windows, job.window)
    else:
        evaluation = sampled_windows(job, windows, measured, tokenizer, progress)[1]
    if job.repeats is not None:
        job.repeats.require_text("calibration", calibration)
        job.repeats.require_text("evaluation", evaluation)
    return Texts(calibration, evaluation)


def with_sampling_notes(resolved: ResolvedJob, texts: Texts) -> ResolvedJob:
    """Return the job with the notes on text that the model samples itself."""
    notes = sampling_notes(resolved.original, texts.calibration, texts.evaluation)
    return replace(resolved, original=resolved.original.noting(notes))


def rewritten(resolved: ResolvedJob, texts: Texts, progress: Progress) -> tuple[ResolvedJob, Draft]:
    """Return the job with the model that the rewriting steps give, which is saved where the job says so."""

    def observe(model: Model) -> Statistics:
        return collect(model, texts.calibration, resolved.job.seed, partial(progress, "statistics: layers"))

    smaller = resolved.recipe.rewritten(resolved.original, observe, partial(progress, "rewrite"))
    if resolved.job.save_pruned is not None:
        save_folder(smaller, resolved.job.save_pruned)
    resolved = resolved.with_rewritten(smaller)
    return resolved, resolved.draft()


def observed(
    resolved: ResolvedJob, draft: Draft, texts: Texts, progress: Progress
) -> tuple[Rewritten, EvaluationStatistics]:
    """Return the model in the coordinates in which it is compressed, and its statistics there on both texts."""
    windows = texts.calibration, texts.evaluation.spread(resolved.prediction_windows)
    layers = partial(progress, "statistics: layers")
    calibration, evaluation = collect_together(resolved.model, windows, resolved.job.seed, layers)
    given = resolved.encoding.coordinates(resolved.target, resolved.model, calibration, draft.decisions)
    return given, EvaluationStatistics(given.statistics, given.of(evaluation))


def decide(resolved: ResolvedJob, draft: Draft, given: Rewritten, progress: Progress) -> Decided:
    """Return the final decisions, and the methods of single matrices."""
    decisions, notes = resolved.decided(draft, given, partial(progress, "allocate: matrices"))
    methods = resolved.encoding.methods(decisions, given, partial(progress, "steps: matrices"))
    return Decided(given, decisions, methods, notes)


def with_predictions(
    resolved: ResolvedJob, decided: Decided, seen: EvaluationStatistics, progress: Progress
) -> Decided:
    """Return the decisions with the loss that each is predicted to add, on both texts."""
    decisions = with_predicted_kl(
        decided.decisions,
        decided.given,
        seen,
        resolved.effort,
        decided.methods,
        partial(progress, "predict: matrices"),
    )
    return replace(decided, decisions=decisions)


def compress_and_lower(
    resolved: ResolvedJob, draft: Draft, decided: Decided, texts: Texts, staging: Path, progress: Progress
) -> Lowered:
    """Return the artifact, written into a new folder.

    Raises:
        ExporterError: the model files take more bytes than they may.
    """
    compression = Compression(
        model=decided.given.model,
        decided=decided.decisions,
        statistics=decided.given.statistics,
        effort=resolved.effort,
        alternation=resolved.encoding.alternation,
        methods=decided.methods,
        propagation_text=propagation_text(resolved.effort, decided.decisions, texts.calibration),
        source=resolved.original,
    )
    folder = staging / "model"
    folder.mkdir()
    lowered = lower(resolved.target, compression, draft.scheme, folder, partial(progress, "compress: matrices"))
    if lowered.artifact.file_bytes > draft.most_file_bytes:
        raise ExporterError(
            "the model files exceed their budget", got=lowered.artifact.file_bytes, expected=draft.most_file_bytes
        )
    return lowered


def gather_evidence(
    resolved: ResolvedJob,
    lowered: Lowered,
    tokens: Tokens,
    source_checks: tuple[Check, ...],
    stage: Stages,
    progress: Progress,
) -> Evidence:
    """Compare the artifact with its original, run it as the device would, and code it if it is to be shipped so."""
    job, artifact, transport = resolved.job, lowered.artifact, resolved.recipe.transport
    emulation, coded = Emulation(), None
    if job.emulate:
        emulation += stage("emulate: Arm instructions", settle, artifact, resolved.device, tokens, progress)
    target = resolved.target
    proof = stage("prove", prove, target, lowered, tokens, job.context, job.threads, progress, job.judge)
    model = lowered.compression.original
    emulation += stage("prove on the NPU", prove_on_npu, artifact, model, resolved.device, tokens, progress)
    if job.emulate:
        emulation += stage("emulate", emulate, artifact, resolved.device, tokens, job.context, progress)
    if transport is not None:
        coded = stage("code for transport", code_beside, artifact.weights, transport, progress)
    return Evidence(replace(proof, checks=source_checks + proof.checks), emulation, coded)
