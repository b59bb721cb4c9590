"""What a job would do and need, said before a weight is read."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from exporter.calibrate.statistics import Statistics
from exporter.coding.chunk import Profile
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.compressed import check_methods
from exporter.compress.method import MatrixMethod
from exporter.device.fit import check_fit
from exporter.device.profile import DeviceProfile, load_device
from exporter.formats.group import Decision
from exporter.foundation.errors import RequestError
from exporter.foundation.progress import Progress
from exporter.foundation.quantities import Basis, Check, Pruning, Quantity
from exporter.model.architecture import Architecture
from exporter.model.model import Model
from exporter.plan.build_footprint import build_peak_bytes, cache_bytes, float_copy_bytes
from exporter.plan.job import Job, require_no_contradiction
from exporter.plan.recipe import NO_RECIPE, Recipe, load_recipe
from exporter.targets.target import AsStored, Target, load_target


@dataclass(frozen=True)
class Plan:
    """Decisions and needs.

    Attributes:
        original: The source.
        model: What decisions are for: the source, or what the recipe's steps leave of it, as the target carries it.
            Before it is rewritten, its shape alone is meant.
        device: The profile.
        target: The target.
        recipe: The steps.
        type: Named mix or format.
        method: Compression method.
        decisions: One for each weight group.
        pruning: What a step takes away from feed-forward parts; None for nothing.
        file_bytes: Estimated size of the model files.
        runtime_peak_bytes: Estimated peak memory of the runtime at the job's context.
        build_peak_bytes: Estimated peak memory of the build.
        disk_bytes: Disk space that the build needs where the bundle is written.
        cache_bytes: Disk space that it needs in the cache.
        text_checks: What the runtime makes of tokenizer and chat template.
        checks: These, and the estimates against the device's limits.
        transport: The profile that the model files are coded with to be shipped; None where they are shipped plain.
        remarks: Sentences on what other options would have given, once that is known.
    """

    original: Model
    model: Model
    device: DeviceProfile
    target: Target
    recipe: Recipe
    type: str = ""
    method: str = ""
    decisions: list[Decision] = field(default_factory=list)
    pruning: Pruning | None = None
    file_bytes: int = 0
    runtime_peak_bytes: int = 0
    build_peak_bytes: int = 0
    disk_bytes: int = 0
    cache_bytes: int = 0
    text_checks: tuple[Check, ...] = ()
    checks: tuple[Check, ...] = ()
    transport: Profile | None = None
    remarks: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        """The recipe where there is one, and the type where the recipe leaves that open."""
        named = [] if self.recipe is NO_RECIPE else [f"recipe {self.recipe.name}"]
        return ", ".join([*named, *([self.type] if self.recipe.encoding is None else [])])

    def coordinates(self, statistics: Statistics) -> Rewritten:
        """Return the model in the coordinates that it is encoded in."""
        encoding = self.recipe.encoding
        if encoding is None:
            return self.target.rewritten(self.model, statistics, self.decisions)
        return encoding.coordinates(self.target, self.model, statistics, self.decisions)

    def methods(self, given: Rewritten, progress: Progress) -> Mapping[str, MatrixMethod]:
        """Return methods of single matrices, by name, from the model in those coordinates."""
        if self.recipe.encoding is None:
            return {}
        return self.recipe.encoding.methods(self.decisions, given, partial(progress, "steps: matrices"))


def make_plan(model: Model, job: Job) -> Plan:
    """Decide on every weight group and estimate sizes and memory; reads no weights.

    Raises:
        RequestError: the device, target, type, method or recipe is unknown, or they do not go together.
    """
    recipe = NO_RECIPE if job.recipe is None else load_recipe(job.recipe)
    require_no_contradiction(job, bool(recipe.rewriting), recipe.encoding is not None)
    device = load_device(job.device)
    target = load_target(device.preferred.target if job.target == "auto" else job.target).on(device)
    if recipe.transport and job.transport:
        raise RequestError(
            "--transport and the recipe's step transport contradict each other", where=job.recipe,
            next_step="leave out --transport",
        )  # fmt: skip
    planned = Plan(model, model, device, target, recipe, transport=recipe.transport or job.transport)
    return with_model(planned, job, recipe.outlined(model), "estimated")


def with_model(planned: Plan, job: Job, model: Model, basis: Basis) -> Plan:
    """Return the plan for what the recipe's steps leave of the source; `basis` says how its shape is known."""
    target, encoding = planned.target, planned.recipe.encoding
    carried = target.carried(model)
    planned = replace(planned, model=carried.model)
    if encoding is None:
        type, method = job.type or target.default_type, job.method or target.default_method
        planned = with_decisions(replace(planned, method=method), job, target.decide(carried.model, type, method), type)
    else:
        decisions = encoding.decide(carried.model, target)
        planned = with_decisions(replace(planned, method=encoding.method), job, decisions, encoding.method)
    return planned if model is planned.original else replace(planned, pruning=_pruning(planned, model, carried, basis))


def with_text(planned: Plan, checks: Sequence[Check], notes: Iterable[str]) -> Plan:
    """Return the plan with what is known of the artifact's text."""
    original = planned.original.noting(notes)
    return replace(planned, original=original, text_checks=tuple(checks), checks=(*checks, *planned.checks))


def with_decisions(planned: Plan, job: Job, decisions: list[Decision], type: str) -> Plan:
    """Return the plan with other decisions and all that follows from them, under a name for their mix."""
    target, model, original = planned.target, planned.model, planned.original
    check_methods(decisions)
    file_bytes = target.estimated_file_bytes(model, decisions)
    peak = target.estimated_peak(model, decisions, job.context).bytes
    quantity = Quantity(value=float(peak), unit="bytes", basis="estimated")
    return replace(
        planned,
        type=type,
        decisions=decisions,
        file_bytes=file_bytes,
        runtime_peak_bytes=peak,
        build_peak_bytes=build_peak_bytes(original, job, planned.recipe, decisions, file_bytes, peak),
        # Coded files stand beside the plain ones until the bundle is complete; a GGUF source is checked before that.
        disk_bytes=file_bytes + max(file_bytes if planned.transport else 0, float_copy_bytes(original)) + (64 << 20),
        cache_bytes=cache_bytes(original, job, planned.recipe),
        checks=(*planned.text_checks, *check_fit(planned.device, file_bytes, quantity, "estimated")),
    )


def _pruning(planned: Plan, pruned: Model, carried: AsStored, basis: Basis) -> Pruning:
    before, after = planned.original.architecture, pruned.architecture
    removed = 1 - sum(after.intermediate) / sum(before.intermediate)
    return Pruning(
        method=" and ".join(step.method for step in planned.recipe.rewriting),
        removed=Quantity(value=removed, unit="fraction", basis=basis),
        widths=after.intermediate,
        carried=carried.how,
        zero_bytes=Quantity(value=float(zero_bytes(after, planned.decisions)), unit="bytes", basis=basis),
    )


def zero_bytes(architecture: Architecture, decisions: list[Decision]) -> int:
    """Return the bytes that channels of zeros take.

    Args:
        architecture: Of the model without them.
        decisions: For the model with them, one for each weight group.
    """
    bare = {group.name: group.size for group in architecture.groups()}
    return sum(one.stored_bytes * (one.group.size - bare[one.group.name]) // one.group.size for one in decisions)
