"""Decisions under a budget of bytes: what every format of every matrix would cost, and the best use of the bytes."""

from dataclasses import dataclass, replace

from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Choice, Storage, allocate, predict, require_enough, smallest_bytes
from exporter.compress.method import load_method
from exporter.errors import RequestError
from exporter.job import Job, Progress
from exporter.model.model import Model
from exporter.targets.target import Target
from exporter.weights.group import Decision


@dataclass(frozen=True)
class Budget:
    """What there is to spend, and on what.

    Attributes:
        file_bytes: Most bytes of the model files.
        fixed_bytes: Bytes of them that are no matrix.
        storages: What formats are chosen for.
    """

    file_bytes: int
    fixed_bytes: int
    storages: list[Storage]


def feasible_budget(job: Job, model: Model, target: Target) -> Budget | None:
    """Return the budget that the job names, or None where the job names a type instead.

    Raises:
        RequestError: the job names more than one of bytes, bits and type, or fewer bytes than any choice of formats
            takes.
    """
    named = [name for name in ("max_file_bytes", "bits", "type") if getattr(job, name) is not None]
    if len(named) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise RequestError(f"{options} contradict each other", next_step="name only one of them")
    most = job.max_file_bytes if job.bits is None else int(job.bits * model.architecture.parameters / 8)
    if most is None:
        return None
    budget = Budget(most, target.fixed_bytes(model), target.storages(model))
    require_enough(most, budget.fixed_bytes + sum(map(smallest_bytes, budget.storages)))
    return budget


def decide_within(
    budget: Budget, job: Job, model: Model, method: str, statistics: Statistics, progress: Progress
) -> list[Decision]:
    """Return a decision for each matrix that together keep the model files within the budget."""
    choices = _choices(budget.storages, job, model, method, statistics, progress)
    decisions = {}
    chosen = allocate(choices, budget.file_bytes, budget.fixed_bytes)
    for storage, choice in zip(budget.storages, chosen, strict=True):
        reason = f"predicted to add KL {choice.kl:.2g} for {choice.bytes:,} bytes"
        for group in storage.groups:
            share = choice.kl * group.size / sum(one.size for one in storage.groups)
            decisions[group.name] = Decision(group, method, choice.format, reason, share)
    return [decisions[group.name] for group in model.groups()]


def foretell(
    decisions: list[Decision], job: Job, model: Model, statistics: Statistics, progress: Progress
) -> list[Decision]:
    """Return decisions that were made by name with the KL divergence that each is predicted to add."""
    storages = [Storage((decision.group,), (decision.format,)) for decision in decisions]
    choices = _choices(storages, job, model, decisions[0].method, statistics, progress)
    return [replace(decision, predicted_kl=choice.kl) for decision, (choice,) in zip(decisions, choices, strict=True)]


def _choices(
    storages: list[Storage], job: Job, model: Model, method: str, statistics: Statistics, progress: Progress
) -> list[list[Choice]]:
    return predict(
        model,
        storages,
        load_method(method, job.effort_level),
        statistics,
        lambda done, total: progress("predict: matrices", done, total),
    )
