"""What a build would do and need, said before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from exporter.device.fit import check_fit
from exporter.formats.group import Decision
from exporter.foundation.quantities import Check, Count, Document, Pruning, Quantity
from exporter.model.decoder import Decoder
from exporter.planning.build_footprint import build_peak_bytes, cache_bytes, float_copy_bytes
from exporter.planning.plan import RecipeDocument
from exporter.planning.resolve import ResolvedJob
from exporter.planning.step import Draft
from exporter.targets.npu import compiled_bytes

# Of the bundle's other files.
OTHER_FILES_BYTES = 64 << 20


@dataclass(frozen=True)
class BuildNeeds:
    """What a build needs, estimated, in bytes.

    Attributes:
        file: The model files.
        runtime_peak: Peak memory of the runtime at the job's context.
        build_peak: Peak memory of the build.
        disk: Disk space where the bundle is written.
        cache: Disk space in the cache.
    """

    file: int
    runtime_peak: int
    build_peak: int
    disk: int
    cache: int


class OutlinedMatrix(Document):
    """The decision on one matrix, as far as it is known before statistics."""

    name: str
    format: str
    method: str
    bytes: Count
    reason: str


class Outline(Document):
    """What `plan` prints; every number of it is estimated.

    Attributes:
        model: What the user calls the model.
        warnings: Sentences on what limits the result.
        device: The device profile's name.
        device_title: Its title.
        target: The target's name.
        recipe: The steps with every option.
        scheme: The recipe's name and the formats, in words.
        method: How codes are chosen.
        pruning: What a step removes from feed-forward parts; None for nothing.
        file_bytes: The model files, with any adapter.
        adapter_bytes: Of them the adapter that is kept beside its base; None for none.
        runtime_peak_bytes: Peak memory of the runtime at the job's context.
        build_peak_bytes: Peak memory of the build on this machine.
        disk_bytes: Disk space that it needs where the bundle is written.
        cache_bytes: Disk space that it needs in the cache.
        build_seconds: Time of the build on this machine with an empty cache.
        stage_seconds: The same for each stage.
        checks: The tokenizer and the chat template, and the estimates against the device's limits.
        decisions: One for each weight group.
    """

    schema_version: Literal[1] = 1
    model: str
    warnings: tuple[str, ...]
    device: str
    device_title: str
    target: str
    recipe: RecipeDocument
    scheme: str
    method: str
    pruning: Pruning | None
    file_bytes: Quantity
    adapter_bytes: Quantity | None
    runtime_peak_bytes: Quantity
    build_peak_bytes: Quantity
    disk_bytes: Quantity
    cache_bytes: Quantity
    build_seconds: Quantity
    stage_seconds: dict[str, Quantity]
    checks: tuple[Check, ...]
    decisions: tuple[OutlinedMatrix, ...]


def outline(resolved: ResolvedJob, draft: Draft, needs: BuildNeeds, seconds: Mapping[str, float]) -> Outline:
    """Return what a build would do and need.

    Args:
        resolved: The job.
        draft: Its decisions before statistics.
        needs: What it needs.
        seconds: Stage -> estimated seconds.
    """
    peak = _estimated(needs.runtime_peak, "bytes")
    adapter = resolved.target.adapter_bytes(resolved.original)
    return Outline(
        model=resolved.original.name,
        warnings=resolved.original.warnings,
        device=resolved.device.name,
        device_title=resolved.device.full_title,
        target=resolved.target.name,
        recipe=resolved.recipe.document,
        scheme=resolved.scheme(draft),
        method=resolved.encoding.chooses_codes_by,
        pruning=pruning(resolved, draft.decisions),
        file_bytes=_estimated(needs.file, "bytes"),
        adapter_bytes=_estimated(adapter, "bytes") if adapter else None,
        runtime_peak_bytes=peak,
        build_peak_bytes=_estimated(needs.build_peak, "bytes"),
        disk_bytes=_estimated(needs.disk, "bytes"),
        cache_bytes=_estimated(needs.cache, "bytes"),
        build_seconds=_estimated(sum(seconds.values()), "s"),
        stage_seconds={stage: _estimated(taken, "s") for stage, taken in seconds.items()},
        checks=(
            *resolved.text_checks,
            *resolved.backend.check(draft.decisions),
            *check_fit(resolved.device, needs.file, peak, "estimated"),
        ),
        decisions=tuple(
            OutlinedMatrix(
                name=one.group.name,
                format=one.stored_as,
                method=one.method,
                bytes=one.stored_bytes,
                reason=one.reason,
            )
            for one in draft.decisions
        ),
    )


def needs_of(resolved: ResolvedJob, decisions: list[Decision]) -> BuildNeeds:
    """Return what a build with these decisions needs; reads no weights."""
    job, recipe, original = resolved.job, resolved.recipe, resolved.original
    file_bytes = resolved.target.estimated_file_bytes(resolved.model, decisions)
    peak = resolved.target.estimated_peak(resolved.model, decisions, job.context).bytes
    # Coded files stand next to the plain ones until the bundle is complete; a GGUF source is checked before that.
    beside = max(file_bytes if recipe.transport else 0, float_copy_bytes(original))
    compiled = compiled_bytes(resolved.target.name, resolved.device, original, decisions)
    return BuildNeeds(
        file=file_bytes,
        runtime_peak=peak,
        build_peak=build_peak_bytes(original, job, recipe, decisions, file_bytes, peak),
        disk=file_bytes + beside + compiled + OTHER_FILES_BYTES,
        cache=cache_bytes(original, job, recipe),
    )


def pruning(resolved: ResolvedJob, decisions: list[Decision]) -> Pruning | None:
    """Return what the rewriting steps remove from feed-forward parts; None where there are none."""
    if not resolved.recipe.rewriting:
        return None
    before, after = resolved.original.decoder, resolved.pruned.decoder
    removed = 1 - sum(after.intermediate) / sum(before.intermediate)
    return Pruning(
        method=" and ".join(step.method for step in resolved.recipe.rewriting),
        removed=Quantity(value=removed, unit="fraction", basis=resolved.shape),
        widths=after.intermediate,
        carried=resolved.stored.how,
        zero_bytes=Quantity(value=float(zero_bytes(after, decisions)), unit="bytes", basis=resolved.shape),
    )


def zero_bytes(decoder: Decoder, decisions: list[Decision]) -> int:
    """Return the bytes that channels of zeros take.

    Args:
        decoder: Of the model without them.
        decisions: For the model with them, one for each weight group.
    """
    bare = {group.name: group.size for group in decoder.groups()}
    return sum(one.stored_bytes * (one.group.size - bare[one.group.name]) // one.group.size for one in decisions)


def _estimated(value: float, unit: str) -> Quantity:
    return Quantity(value=float(value), unit=unit, basis="estimated")
