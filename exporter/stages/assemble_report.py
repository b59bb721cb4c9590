"""From what the stages found to the documents of a bundle."""

import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from exporter import __version__
from exporter.bundle.manifest import PLAN, ManifestHeader, Provenance, presentable
from exporter.coding.container import CodedSize
from exporter.device.fit import FILE_SIZE, check_fit
from exporter.device.profile import DeviceProfile
from exporter.foundation.quantities import Basis, Check, Quantity
from exporter.model.model import Model
from exporter.planning.expected import expected
from exporter.planning.job import Job
from exporter.planning.outline import pruning
from exporter.planning.plan import Plan
from exporter.planning.resolve import ResolvedJob
from exporter.prove.emulation import NEVER_FAILING, Emulation
from exporter.prove.proof import Proof
from exporter.prove.self_test import SelfTest
from exporter.report.data import (
    Accuracy,
    DeviceCheck,
    HostFacts,
    Measurements,
    Memory,
    ModelFacts,
    RecipeFacts,
    Report,
    Size,
    Speed,
    StageTime,
    TensorRow,
    to_json,
)
from exporter.report.html import render_html
from exporter.stages.stage_times import Stages
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered
from exporter.targets.facts import facts_of, libraries

# The packages that decide the bytes of every target; each target names its own.
LIBRARIES = ("torch", "transformers", "zstandard")


@dataclass(frozen=True)
class Evidence:
    """What was found out about an artifact.

    Attributes:
        proof: How it compares with its original in the real runtime.
        emulation: How it runs under the device's limits and instructions.
        coded: The size of its coded files; None if it is not to be shipped so.
    """

    proof: Proof
    emulation: Emulation
    coded: CodedSize | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the plan."""
        return tuple(self.emulation.notes)


def describe(
    resolved: ResolvedJob,
    plan: Plan,
    scheme: str,
    lowered: Lowered,
    evidence: Evidence,
    stages: Stages,
) -> tuple[Report, Measurements]:
    """Return report and measurements of a finished job."""
    model, artifact = lowered.compression.original, lowered.artifact
    proof, emulation, coded = evidence.proof, evidence.emulation, evidence.coded
    measurements = _measurements(resolved, artifact, proof, emulation, stages)
    recipe = RecipeFacts(
        scheme=scheme,
        method=resolved.encoding.chooses_codes_by,
        effort=plan.recipe.effort,
        calibration=plan.calibration,
        evaluation=plan.evaluation,
        seed=plan.seed,
        context=plan.window,
        transport=resolved.recipe.transport,
        remarks=plan.notes,
    )
    report = Report(
        model=_model_facts(model),
        device=plan.device,
        device_title=resolved.device.full_title,
        expected=expected(resolved, scheme, list(lowered.compression.decided), artifact.file_bytes),
        target=plan.target,
        recipe=recipe,
        pruning=pruning(resolved, list(lowered.compression.decided)),
        size=_size(artifact, coded, model),
        accuracy=_accuracy(proof, plan),
        checks=proof.checks + resolved.backend.check(lowered.compression.decided),
        device_checks=tuple(
            DeviceCheck.of(check, exact=check.name == FILE_SIZE)
            for check in measurements.checks
            if check.name not in NEVER_FAILING
        ),
        tensors=_rows(lowered),
    )
    return report, measurements


def _measured(value: float, unit: str, basis: Basis = "measured") -> Quantity:
    return Quantity(value=float(value), unit=unit, basis=basis)


def _model_facts(model: Model) -> ModelFacts:
    return ModelFacts(
        name=model.name,
        origin=model.origin,
        architecture=model.decoder.family.architecture,
        parameters=model.decoder.parameters,
        digest=model.digest,
        warnings=model.warnings,
    )


def _size(artifact: Artifact, coded: CodedSize | None, model: Model) -> Size:
    def both(count: int) -> tuple[Quantity, Quantity]:
        return _measured(count, "bytes"), _measured(8 * count / model.decoder.parameters, "bits")

    file_bytes, bits = both(artifact.file_bytes)
    shipped, shipped_bits = (None, None) if coded is None else both(coded.coded_bytes)
    return Size(file_bytes=file_bytes, bits_per_weight=bits, coded_bytes=shipped, coded_bits_per_weight=shipped_bits)


def _accuracy(proof: Proof, plan: Plan) -> Accuracy:
    found = proof.accuracy
    predicted = sum(matrix.evaluation_kl for matrix in plan.matrices)
    return Accuracy(
        kl_mean=_measured(found.kl_mean, "nats"),
        kl_p99=_measured(found.kl_p99, "nats"),
        top1_agreement=_measured(found.top1_agreement, "fraction"),
        confident_agreement=_measured(found.confident_agreement, "fraction"),
        perplexity_ratio=_measured(found.perplexity_ratio, "ratio"),
        predicted_kl=_measured(predicted, "nats", "estimated"),
        runtime_rounding_kl=_measured(proof.rounding.kl_mean, "nats"),
        default_kl_mean=None if proof.by_default is None else _measured(proof.by_default.kl_mean, "nats"),
        tokens=found.tokens,
        text_digest=plan.evaluation.digest,
    )


def _rows(lowered: Lowered) -> tuple[TensorRow, ...]:
    return tuple(
        TensorRow(
            name=decision.group.name,
            role=decision.group.role,
            layer=decision.group.layer,
            rows=decision.group.rows,
            columns=decision.group.columns,
            format=decision.stored_as,
            method=decision.method,
            reason=decision.reason,
            stored_bytes=decision.stored_bytes,
            bits_per_weight=8 * decision.stored_bytes / decision.group.size,
            output_error=lowered.outcomes[decision.group.name].output_error,
            calibration_kl=decision.calibration_kl or 0.0,
            evaluation_kl=decision.predicted_kl or 0.0,
        )
        for decision in lowered.compression.decided
    )


def _measurements(
    resolved: ResolvedJob, artifact: Artifact, proof: Proof, emulation: Emulation, stages: Stages
) -> Measurements:
    timing = proof.timing
    peak = _measured(timing.peak_bytes, "bytes")
    return Measurements(
        speed=Speed(
            prefill_tokens_per_s=_measured(timing.prefill_tokens_per_s, "tokens/s"),
            decode_tokens_per_s=_measured(timing.decode_tokens_per_s, "tokens/s"),
            time_to_first_token_ms=_measured(1000 * timing.first_token_s, "ms"),
        ),
        memory=Memory(peak_bytes=peak, interpreter_bytes=_measured(timing.interpreter_bytes, "bytes")),
        stages=tuple(StageTime(name=s.name, seconds=s.seconds, peak_bytes=s.peak_bytes) for s in stages.done),
        host=host_facts(),
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checks=device_checks(resolved.device, artifact, peak) + emulation.checks + proof.judged,
        emulation=dict(emulation.quantities),
    )


def device_checks(device: DeviceProfile, artifact: Artifact, peak: Quantity) -> tuple[Check, ...]:
    """Hold the measured size and memory against the device's limits."""
    return tuple(check_fit(device, artifact.file_bytes, peak, "measured"))


def host_facts() -> HostFacts:
    """Return what this machine is."""
    return HostFacts(
        cpu=_cpu_name(),
        cores=psutil.cpu_count() or 1,
        ram_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
    )


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes."""
    found = {}
    for name in (*LIBRARIES, *libraries()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def header(job: Job, model: Model, report: Report) -> ManifestHeader:
    """Return what the manifest says besides its files."""
    versions = library_versions()
    return ManifestHeader(
        name=presentable(model.name),
        target=report.target,
        device=report.device,
        runtime={name: versions[name] for name in facts_of(report.target).runtime_libraries if name in versions},
        recipe=report.recipe,
        provenance=Provenance(
            exporter=__version__,
            versions=versions,
            model_digest=model.digest,
            instruction_set=platform.machine(),
            threads=job.threads,
        ),
    )


def write_documents(staging: Path, plan: Plan, report: Report, measurements: Measurements, self_test: SelfTest) -> None:
    """Write plan.json, report.json, measurements.json, selftest.json and report.html into the staged bundle."""
    (staging / PLAN).write_text(to_json(plan), encoding="utf-8")
    (staging / "selftest.json").write_text(to_json(self_test), encoding="utf-8")
    (staging / "report.json").write_text(to_json(report), encoding="utf-8")
    (staging / "measurements.json").write_text(to_json(measurements), encoding="utf-8")
    (staging / "report.html").write_text(render_html(report, measurements), encoding="utf-8")
