"""Decisions under a budget of bytes: what every format of every matrix would cost, and the best use of the bytes."""

from exporter.calibrate.sensitivity import collect_sensitivities
from exporter.calibrate.statistics import Statistics
from exporter.calibrate.text import Windows
from exporter.compress.allocate import allocate, predict, require_enough, smallest_bytes
from exporter.errors import RequestError
from exporter.job import Job, Progress
from exporter.model.model import Model
from exporter.targets.target import Target
from exporter.weights.group import Decision


def feasible_budget(job: Job, model: Model, target: Target) -> int | None:
    """Return the most bytes that the model files may take, or None where the job names a type instead.

    Raises:
        RequestError: the job names more than one of bytes, bits and type, or fewer bytes than any choice of formats
            takes.
    """
    named = [name for name in ("max_file_bytes", "bits", "type") if getattr(job, name) is not None]
    if len(named) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise RequestError(f"{options} contradict each other", next_step="name only one of them")
    budget = job.max_file_bytes if job.bits is None else int(job.bits * model.architecture.parameters / 8)
    if budget is not None:
        require_enough(budget, target.fixed_bytes(model) + sum(map(smallest_bytes, target.storages(model))))
    return budget


def decide_within(
    budget: int,
    job: Job,
    model: Model,
    target: Target,
    method: str,
    calibration: Windows,
    statistics: Statistics,
    progress: Progress,
) -> list[Decision]:
    """Return a decision for each matrix that together keep the model files within the budget.

    Raises:
        RequestError: no choice of formats is so small; the smallest is named.
    """
    sensitivities = collect_sensitivities(
        model, calibration, job.seed, lambda done, total: progress("sensitivities: layers", done, total)
    )
    storages = target.storages(model)
    choices = predict(
        model,
        storages,
        method,
        statistics,
        sensitivities,
        lambda done, total: progress("predict: matrices", done, total),
    )
    decisions = {}
    for storage, choice in zip(storages, allocate(choices, budget, target.fixed_bytes(model)), strict=True):
        reason = f"predicted to add KL {choice.kl:.2g} for {choice.bytes:,} bytes"
        for group in storage.groups:
            decisions[group.name] = Decision(group, method, choice.format, reason)
    return [decisions[group.name] for group in model.groups()]
