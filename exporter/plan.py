"""What a job would do and need, said before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from exporter.calibrate.statistics import Statistics
from exporter.coding.chunk import Profile
from exporter.compress.caldera import TURNS, Turns
from exporter.compress.equalise import Rewritten
from exporter.compress.method import Method
from exporter.device.fit import check_fit
from exporter.device.profile import DeviceProfile, load_device
from exporter.errors import RequestError
from exporter.job import Job, Progress, require_no_contradiction
from exporter.measures import Check, Quantity
from exporter.model.model import Model
from exporter.needs import build_peak_bytes, cache_bytes
from exporter.recipe import load_recipe
from exporter.steps.step import EncodingStep
from exporter.targets.target import Target, load_target
from exporter.weights.group import Decision


@dataclass(frozen=True)
class Plan:
    """Decisions and needs.

    Attributes:
        model_name: The model's name.
        device: The profile.
        target: The target.
        type: Named mix or format.
        method: Compression method.
        decisions: One for each weight group.
        turns: How matrices and their factors take turns where decisions have factors.
        file_bytes: Estimated size of the model files.
        runtime_peak_bytes: Estimated peak memory of the runtime at the job's context.
        build_peak_bytes: Estimated peak memory of the build.
        disk_bytes: Disk space that the build needs where the bundle is written.
        cache_bytes: Disk space that it needs in the cache.
        checks: The estimates against the device's limits.
        encoding: The step of a recipe that gives matrices their codes; None without a recipe.
        transport: The profile that the model files are coded with to be shipped; None where they are shipped plain.
    """

    model_name: str
    device: DeviceProfile
    target: Target
    type: str
    method: str
    decisions: list[Decision]
    file_bytes: int
    runtime_peak_bytes: int
    build_peak_bytes: int
    disk_bytes: int
    cache_bytes: int
    checks: tuple[Check, ...]
    turns: Turns = TURNS
    encoding: EncodingStep | None = None
    transport: Profile | None = None

    def coordinates(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model in the coordinates that it is encoded in."""
        if self.encoding is None:
            return self.target.rewritten(model, statistics)
        return self.encoding.coordinates(self.target, model, statistics)

    def methods(self, given: Rewritten, progress: Progress) -> Mapping[str, Method]:
        """Return methods of single matrices, by name, from the model in those coordinates."""
        if self.encoding is None:
            return {}
        groups = [decision.group for decision in self.decisions]
        return self.encoding.methods(
            groups, given.model, given.statistics, lambda done, total: progress("steps: matrices", done, total)
        )


def make_plan(model: Model, job: Job) -> Plan:
    """Decide on every weight group and estimate sizes and memory; reads no weights.

    Raises:
        RequestError: the device, target, type, method or recipe is unknown, or they do not go together.
    """
    require_no_contradiction(job)
    device = load_device(job.device)
    target = load_target(device.preferred.target if job.target == "auto" else job.target).on(device)
    kind, method = job.type or target.default_type, job.method or target.default_method
    planned = Plan(model.name, device, target, kind, method, [], 0, 0, 0, 0, 0, (), transport=job.transport)
    if job.recipe is None:
        return with_decisions(planned, model, job, target.decide(model, kind, method), kind)
    recipe = load_recipe(job.recipe)
    if recipe.transport and job.transport:
        raise RequestError(
            "--transport and the recipe's step transport contradict each other", where=job.recipe,
            next_step="leave out --transport",
        )  # fmt: skip
    decisions = recipe.decide(model, target)
    planned = replace(
        planned,
        method=recipe.encoding.method,
        turns=recipe.turns,
        encoding=recipe.encoding,
        transport=recipe.transport or planned.transport,
    )
    return with_decisions(planned, model, job, decisions, f"recipe {recipe.name}")


def with_decisions(planned: Plan, model: Model, job: Job, decisions: list[Decision], type: str) -> Plan:
    """Return the plan with other decisions and all that follows from them, under a name for their mix."""
    target = planned.target
    file_bytes = target.estimated_file_bytes(model, decisions)
    peak = target.estimated_peak_bytes(model, decisions, job.context)
    quantity = Quantity(value=float(peak), unit="bytes", basis="estimated")
    return replace(
        planned,
        type=type,
        decisions=decisions,
        file_bytes=file_bytes,
        runtime_peak_bytes=peak,
        build_peak_bytes=build_peak_bytes(model, job, file_bytes, peak),
        # Coded files stand beside the plain ones until the bundle is complete.
        disk_bytes=(2 if planned.transport else 1) * file_bytes + (64 << 20),
        cache_bytes=cache_bytes(model, job),
        checks=tuple(check_fit(planned.device, file_bytes, quantity, "estimated")),
    )
