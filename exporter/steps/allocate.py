"""The step `allocate`: each matrix gets the format that keeps behaviour best within limits of bytes and speed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from exporter.calibrate.layer_stream import Progress
from exporter.compress.allocate import Choice, Limits, Storage, predicted_choices, stored_bytes
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.effort import Effort
from exporter.compress.method import AS_STORED, load_method
from exporter.formats.group import Decision
from exporter.foundation.config_files import impossible
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.planning.budget import (
    Budget,
    chosen,
    cost_of_speed,
    cpu_as_predicted,
    decisions_of,
    require_feasible,
    stock_of_that_size,
)
from exporter.planning.step import Draft, EncodingStep, EncodingTask, kept_codes
from exporter.steps.named_type import Name
from exporter.targets.backends import BackendFormats
from exporter.targets.contract import Target, budgeted

Rate = Annotated[float, Field(gt=0, le=1e12)]


class Allocate(EncodingStep):
    """Options of the step. Without any limit, the bytes of the target's default type are the limit.

    Attributes:
        max_file_bytes: Most bytes of the model files.
        bits: The same as bits a weight of the source, everything in the files counted.
        min_decode: Least tokens/s that the device is expected to generate.
        min_prefill: Least tokens/s that it is expected to read of a prompt.
        prefer: `accuracy`: the least loss; `balanced`: that of choices no slower than the stock tool's at as many
            bytes; `speed`: the fastest of those with at most twice the loss.
        codes: The method that chooses codes, `ldlq` or `rtn`; None for the target's default.
    """

    method: Literal["allocate"]
    max_file_bytes: Annotated[int, Field(ge=1, lt=1 << 63)] | None = None
    bits: Annotated[float, Field(gt=0, le=1e6)] | None = None
    min_decode: Rate | None = None
    min_prefill: Rate | None = None
    prefer: Literal["balanced", "accuracy", "speed"] = "balanced"
    codes: Name | None = None

    @model_validator(mode="after")
    def _has_one_size(self) -> Self:
        if self.max_file_bytes is not None and self.bits is not None:
            got = f"max_file_bytes = {self.max_file_bytes}, bits = {self.bits:g}"
            raise impossible("the size is limited twice", got, "one of the two")
        return self

    @property
    def chooses_codes_by(self) -> str:
        """The method that chooses codes."""
        return self.codes or self.method

    def resolved(self, target: Target) -> Self:
        """Return the step with the target's default method where none is named."""
        return self.model_copy(update={"codes": self.codes or target.default_method})

    def draft(self, task: EncodingTask) -> Draft:
        """Return the decisions as they would be if every weight counted the same.

        Raises:
            RequestError: no choice of formats keeps the limits; the nearest one that does is named.
        """
        budget = self._budget(task)
        require_feasible(budget)
        choices = [_estimated(storage, task.model) for storage in budget.storages]
        codes = self.codes or task.target.default_method
        best = chosen(budget, budget.all_timed(choices))
        decisions = decisions_of(budget, best, task.model, codes, "estimated; build decides from the calibration text")
        draft = Draft(decisions, budget.scheme, budget.storages, budget.file_bytes, budget.limits.bytes)
        return _Allocation(**vars(draft), codes=codes, effort=task.effort, budget=budget)

    def _budget(self, task: EncodingTask) -> Budget:
        rates = {"decode_s": self.min_decode, "prefill_s": self.min_prefill}
        seconds = {name: 1 / rate for name, rate in rates.items() if rate is not None}
        target, model, most = budgeted(task.target), task.model, self._most_bytes(task)
        fixed = target.fixed_bytes(model) + target.adapter_bytes(task.original)
        limits = Limits(**seconds) if most is None else Limits(bytes=most - fixed, **seconds)
        storages = _computed(target.storages(model), task.backend)
        cpu = cpu_as_predicted(target, model, storages, task.device, task.backend.name)
        stock = [] if most is None else stock_of_that_size(target, model, most - fixed)
        return Budget(limits, fixed, storages, self.prefer, target, cpu, stock)

    def _most_bytes(self, task: EncodingTask) -> int | None:
        if self.max_file_bytes is not None:
            return self.max_file_bytes
        if self.bits is not None:
            return int(self.bits * task.original.decoder.parameters / 8)
        if self.min_decode is not None or self.min_prefill is not None:
            return None
        target, model = task.target, task.model
        decisions = target.decide(model, target.default_type, target.default_method)
        return target.estimated_file_bytes(model, decisions) + target.adapter_bytes(task.original)


@dataclass(frozen=True)
class _Allocation(Draft):
    """Formats that are chosen once statistics are there.

    Attributes:
        codes: The method that chooses codes.
        effort: What it spends.
        budget: The limits.
    """

    codes: str = field(kw_only=True)
    effort: Effort = field(kw_only=True)
    budget: Budget = field(kw_only=True)

    @property
    def methods(self) -> tuple[str, ...]:
        """The method that chooses codes, and that of matrices that keep the source's."""
        return self.codes, AS_STORED

    def decided(self, given: Rewritten, progress: Progress) -> tuple[list[Decision], tuple[str, ...]]:
        """Return the decisions with the least predicted loss on the calibration text that suit the preference."""
        budget, method = self.budget, load_method(self.codes, self.effort)
        predicted = predicted_choices(
            given.model, budget.storages, method, given.statistics, progress,
            as_stored=load_method(AS_STORED, self.effort),
        )  # fmt: skip
        choices = budget.all_timed(predicted)
        best = chosen(budget, choices)
        decisions = decisions_of(budget, best, given.model, self.codes, "the least predicted loss within the limits")
        return decisions, (*cost_of_speed(budget, choices, best), *kept_codes(decisions))


def _estimated(storage: Storage, model: Model) -> list[Choice]:
    """Return what each format of a storage would cost if every weight counted the same.

    A bit more in each weight makes the squared error of rounding a quarter (Gersho and Gray 1992, section 5.6). Codes
    of the source lose as little as the most bits: what is left is the rounding of activations to 8 bits.
    """
    size = sum(group.size for group in storage.groups)
    most = max(stored_bytes(storage, format) for format in storage.formats)
    choices = []
    for format in storage.formats:
        taken = stored_bytes(storage, format)
        kept = all(model.has_codes(group.name, format) for group in storage.groups)
        choices.append(Choice(format, taken, size * 4.0 ** (-8 * (most if kept else taken) / size)))
    return choices


def _computed(storages: Sequence[Storage], backend: BackendFormats) -> list[Storage]:
    """Return the storages with the formats that the backend computes as they are.

    Raises:
        RequestError: it computes none of a matrix.
    """
    made = []
    for storage in storages:
        formats = tuple(one for one in storage.formats if backend.computes(one.name))
        if not formats:
            raise RequestError(
                f"{backend.name} computes no format that this matrix can have", where=storage.groups[0].name,
                got=", ".join(one.name for one in storage.formats), next_step="choose another backend or target",
            )  # fmt: skip
        made.append(replace(storage, formats=formats))
    return made


STEP = Allocate
