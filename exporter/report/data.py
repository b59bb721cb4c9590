"""What a bundle says about itself: report.json, measurements.json, and both together.

`Report` holds what the same job gives again, byte for byte; `Measurements` holds what differs from run to run.
"""

import json
from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, FailFast, Field, model_validator

from exporter.coding.profiles import Profile
from exporter.foundation.quantities import Check, Count, Document, Pruning, Quantity, Status
from exporter.planning.plan import Plan, TextFacts
from exporter.predict.prediction import Prediction

Sentences = Annotated[tuple[str, ...], FailFast()]
# Left out where there is none, as in version 0.1.0.
Predicted = Annotated[float | None, Field(exclude_if=lambda kl: kl is None)]
Verdict = Literal["passed", "failed", "incomplete"]


class ModelFacts(Document):
    """The model before compression.

    Attributes:
        name: What the user calls it.
        origin: Where it came from, such as `Hugging Face folder`.
        architecture: Class name in config.json.
        parameters: Number of weights, a tied embedding counted once.
        digest: SHA-256 over the source's files.
        warnings: Sentences on what limits the result, such as a source that was quantised before.
    """

    name: str
    origin: str
    architecture: str
    parameters: Count
    digest: str
    warnings: Sentences = ()


class TensorRow(Document):
    """The decision on one matrix, and what it cost.

    Attributes:
        name: Tensor name in the source model.
        role: Role in the network, such as `down`.
        layer: Index of the decoder layer, or None outside the layers.
        rows: Outputs (for the embedding: tokens).
        columns: Inputs.
        format: The weight format's own name.
        method: How the codes were chosen.
        reason: Why this format and method.
        stored_bytes: Bytes in the model file.
        bits_per_weight: Stored bits for each weight, scales and padding included.
        output_error: Relative squared error of the matrix's outputs: that of the planned weights under the second
            moments of the inputs; None where the outputs are all zero. Version 0.1.0 called it `weight_error`.
        calibration_kl: KL divergence a token, in nats, that the decision is predicted to add on the calibration text;
            None in reports of version 0.1.0.
        evaluation_kl: The same on the evaluation text.
    """

    name: str
    role: str
    layer: Count | None
    rows: Count
    columns: Count
    format: str
    method: str
    reason: str
    stored_bytes: Count
    bits_per_weight: float
    output_error: Annotated[float | None, Field(validation_alias=AliasChoices("output_error", "weight_error"))]
    calibration_kl: Predicted = None
    evaluation_kl: Predicted = None


class Accuracy(Document):
    """The artifact in its runtime against the original model, on the same tokens.

    Attributes:
        kl_mean: KL(original || artifact) a token, in `nats`.
        kl_p99: Its 99th percentile, in `nats`.
        top1_agreement: Share of tokens where both choose the same next token, as a `fraction`.
        confident_agreement: The same where the original's first choice leads by more than 0.5 nats, as a `fraction`.
        perplexity_ratio: Perplexity of the artifact over that of the original, a `ratio`.
        predicted_kl: What the formats were predicted to cost before anything was encoded, in `nats`; what was pruned
            before is not in it.
        runtime_rounding_kl: What the rounding of activations, the runtime's own or the graph's, adds, in `nats`.
        default_kl_mean: `kl_mean` as the runtime computes by default, in `nats`, if it rounds activations more than the
            files state; absent if that is what `kl_mean` compares.
        tokens: Number of tokens compared.
        text_digest: SHA-256 of the text they come from.
    """

    kl_mean: Quantity
    kl_p99: Quantity
    top1_agreement: Quantity
    confident_agreement: Quantity
    perplexity_ratio: Quantity
    predicted_kl: Quantity
    runtime_rounding_kl: Quantity
    default_kl_mean: Annotated[Quantity | None, Field(exclude_if=lambda value: value is None)] = None
    tokens: Count
    text_digest: str


class Size(Document):
    """What the model takes; bits are for each weight of the original.

    Attributes:
        file_bytes: Of the runtime's model files on disk, in `bytes`.
        bits_per_weight: The same for each weight, in `bits`.
        coded_bytes: Of the coded files that are shipped in their stead, everything included, in `bytes`; None for none.
        coded_bits_per_weight: The same for each weight, in `bits`.
    """

    file_bytes: Quantity
    bits_per_weight: Quantity
    coded_bytes: Quantity | None = None
    coded_bits_per_weight: Quantity | None = None


class RecipeFacts(Document):
    """What was asked for: together with the model and the tool's version it decides the content.

    Attributes:
        scheme: Name of the formats' mix, such as `Q4_K_M` or `int4`.
        method: Name of the compression method.
        effort: How much work the method did: `fast`, `balanced` or `max`.
        calibration: The text that the statistics come from.
        evaluation: The text that accuracy was measured on.
        seed: Seed of everything random.
        context: Tokens of a window in calibration and evaluation.
        transport: The profile that model files are coded with; None where they are shipped as they are.
        remarks: Sentences on what other options would have given.
    """

    scheme: str
    method: str
    effort: str
    calibration: TextFacts
    evaluation: TextFacts
    seed: Count
    context: Count
    transport: Profile | None = None
    remarks: Sentences = ()


class DeviceCheck(Document):
    """What of a check in measurements.json is the same from run to run.

    Attributes:
        name: Its name.
        status: How it ended.
        limit: What it was held to.
        unit: Of limit and value.
        value: What was compared, where that is exact; None where it was measured and differs from run to run.
    """

    name: str
    status: Status
    limit: float | None
    unit: str
    value: float | None

    @classmethod
    def of(cls, check: Check, exact: bool) -> "DeviceCheck":
        """Return what of a check is the same from run to run; its value only where that is exact."""
        value = check.value if exact else None
        return cls(name=check.name, status=check.status, limit=check.limit, unit=check.unit, value=value)

    def agrees_with(self, check: Check) -> bool:
        """Return whether a check says the same."""
        return self == DeviceCheck.of(check, exact=self.value is not None)


class Report(Document):
    """report.json: what the same job gives again, byte for byte.

    Attributes:
        schema_version: 1 is that of version 0.1.0, which has no `device_checks`.
        expected: What it is expected to do on the device; None for a model too small for a prediction, and in reports
            of earlier versions.
        device_checks: The checks of measurements.json, so that the content digest covers how they ended.
    """

    schema_version: Literal[1, 2] = 2
    model: ModelFacts
    device: str
    device_title: str
    expected: Annotated[Prediction | None, Field(exclude_if=lambda made: made is None)] = None
    target: str
    recipe: RecipeFacts
    pruning: Pruning | None = None
    size: Size
    accuracy: Accuracy
    checks: Annotated[tuple[Check, ...], FailFast()]
    device_checks: Annotated[tuple[DeviceCheck, ...], FailFast(), Field(exclude_if=lambda rows: not rows)] = ()
    tensors: Annotated[tuple[TensorRow, ...], FailFast()]

    @model_validator(mode="after")
    def _of_its_version(self) -> Self:
        if self.schema_version == 1 and self.device_checks:
            raise ValueError("schema version 1 has no device checks")
        return self

    @property
    def passed(self) -> bool:
        """Whether every check in this document was run and passed."""
        return verdict(self.checks) == "passed"


class Speed(Document):
    """Speed of the artifact in its runtime, in `tokens/s` and `ms`."""

    prefill_tokens_per_s: Quantity
    decode_tokens_per_s: Quantity
    time_to_first_token_ms: Quantity


class Memory(Document):
    """Peak resident `bytes` of the runtime's process, and how many were there before the model was loaded."""

    peak_bytes: Quantity
    interpreter_bytes: Quantity


class StageTime(Document):
    """How long one stage of the job took, and the peak resident memory during it."""

    name: str
    seconds: Annotated[float, Field(ge=0)]
    peak_bytes: Count


class HostFacts(Document):
    """The machine that measured."""

    cpu: str
    cores: Count
    ram_bytes: Count
    system: str
    python: str


class Measurements(Document):
    """measurements.json: what differs from run to run.

    Attributes:
        speed: Of the artifact in its runtime.
        memory: Of the runtime's process.
        stages: Time and memory of the job itself, in order.
        host: The machine.
        versions: Library name -> version.
        created: When the job ended, ISO 8601 in UTC.
        checks: Checks whose values differ from run to run, such as measured memory against a device's limit.
        emulation: What was found on this machine under the device's limits or instruction set; empty where neither was
            emulated. Times in it are this machine's.
    """

    schema_version: Literal[1] = 1
    speed: Speed
    memory: Memory
    stages: Annotated[tuple[StageTime, ...], FailFast()]
    host: HostFacts
    versions: dict[str, str]
    created: str
    checks: Annotated[tuple[Check, ...], FailFast()] = ()
    emulation: dict[str, Quantity] = Field(default_factory=dict)


def verdict(checks: tuple[Check, ...]) -> Verdict:
    """Sum up checks: failed if any failed, incomplete if any was not run (or there are none), else passed."""
    states = {check.status for check in checks}
    if "failed" in states:
        return "failed"
    return "passed" if states == {"passed"} else "incomplete"


def disagreements(report: Report, measurements: Measurements) -> list[str]:
    """Return the names of checks that measurements.json tells more than once, or otherwise than report.json."""
    told = {check.name: check for check in measurements.checks}
    counts = Counter(check.name for check in measurements.checks)
    wrong = {name for name, count in counts.items() if count > 1}
    wrong |= {one.name for one in report.device_checks if one.name not in told or not one.agrees_with(told[one.name])}
    return sorted(wrong)


def agree(plan: Plan, report: Report) -> bool:
    """Return whether a plan is that of what a report is on: the model, the texts, and the decision on each matrix."""
    facts = report.recipe
    planned = (plan.model_digest, plan.device, plan.target, plan.recipe.effort, plan.seed, plan.window)
    reported = (report.model.digest, report.device, report.target, facts.effort, facts.seed, facts.context)
    texts = (plan.calibration, plan.evaluation, plan.notes) == (facts.calibration, facts.evaluation, facts.remarks)
    return texts and planned == reported and [_planned(row) for row in report.tensors] == [
        (one.name, one.stored_as, one.method, one.reason, one.calibration_kl, one.evaluation_kl)
        for one in plan.matrices
    ]  # fmt: skip


def _planned(row: TensorRow) -> tuple[object, ...]:
    return (row.name, row.format, row.method, row.reason, row.calibration_kl, row.evaluation_kl)


def merged(report: Report, measurements: Measurements) -> dict[str, object]:
    """Return both documents as one JSON-able object, with the checks of both and the verdict over them."""
    checks = report.checks + measurements.checks
    told = report.model_dump(mode="json")
    return {
        "device_title": report.device_title,
        "expected": told.get("expected"),
        **measurements.model_dump(mode="json"),
        **told,
        "checks": [check.model_dump(mode="json") for check in checks],
        "verdict": verdict(checks),
    }


def to_json(document: Document) -> str:
    """Return a document's only spelling: keys sorted, floats as their shortest exact decimals, a last newline."""
    return canonical_json(document.model_dump(mode="json"))


def canonical_json(value: object) -> str:
    """Return the only spelling of a JSON-able value; see `to_json`."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
