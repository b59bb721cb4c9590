"""Budgets: limits of bytes and of a device's time, and the choice of formats that suits a preference best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter

from exporter.compress.allocate import Choice, Limits, Storage, allocate, stored_bytes
from exporter.device.backend import BackendName
from exporter.device.profile import DeviceProfile
from exporter.formats.format import WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.foundation.fitted import fitted_value
from exporter.model.decoder import TOKENS
from exporter.model.model import Model
from exporter.predict.rates import rates
from exporter.predict.request import LEAST_BYTES, LEAST_PARAMETERS, Request, checked_request
from exporter.predict.roofline import Cpu, Throughput
from exporter.targets.contract import Budgeted, with_codes

# A choice that prefers speed may cost so many times the least KL that the limits allow.
SPEED_KL = 2.0
# Of the stock tool's prefill at as many bytes, what a choice must at least be expected to have; of its decoding, all.
LEAST_PREFILL = fitted_value("exporter.planning", "least_prefill")
# Of the predicted KL of a choice: a least one below that is worth a remark.
FAR_FROM_LEAST = 0.9
# What the stock tool makes counts as of the same size where it has that much more: alignment is counted at its most.
SAME_SIZE = 1.005
# Off a rate that is named with few digits, so that it can be had.
ROUNDED = 1e-3
# An answer as llama-bench's default tests have it: what a choice that prefers speed makes shortest.
PROMPT_TOKENS, ANSWER_TOKENS = 512, 128


@dataclass(frozen=True)
class Budget:
    """What there is to spend, and on what.

    Attributes:
        limits: The most that all matrices together may take; see `exporter.compress.allocate.Choice`.
        fixed_bytes: Bytes of the model files that are no matrix.
        storages: What formats are chosen for.
        prefer: `balanced`, `accuracy` or `speed`; see `chosen`.
        target: Knows how quick its kernels are.
        cpu: The device's.
        stock: What the stock tool makes of no more bytes; empty where it makes nothing so small.
    """

    limits: Limits
    fixed_bytes: int
    storages: list[Storage]
    prefer: str
    target: Budgeted
    cpu: Cpu
    stock: list[Decision]

    @property
    def file_bytes(self) -> float:
        """Most bytes of the model files."""
        return self.limits.bytes + self.fixed_bytes

    @property
    def scheme(self) -> str:
        """The limits in words."""
        words = [_limit_in_words(name, limit, self.fixed_bytes) for name, limit in _set(self.limits).items()]
        return ", ".join([*words, *([] if self.prefer == "balanced" else [f"{self.prefer} preferred"])])

    @cached_property
    def no_slower_than_stock(self) -> Limits:
        """The limits, and those of what the stock tool makes: its times, in proportion to the bytes."""
        made = [self.timed(Storage.of(one), Choice(one.format, one.stored_bytes, 0)) for one in self.stock]
        if not made:
            return self.limits
        larger = max(self.limits.bytes / sum(choice.bytes for choice in made), 1.0)
        decode_s = larger * sum(choice.decode_s for choice in made) / (1 + self.target.decode_margin)
        prefill_s = larger * sum(choice.prefill_s for choice in made) / LEAST_PREFILL
        return replace(
            self.limits,
            decode_s=min(self.limits.decode_s, decode_s),
            prefill_s=min(self.limits.prefill_s, prefill_s),
        )

    def timed(self, storage: Storage, choice: Choice) -> Choice:
        """Return a choice with the time that it takes on the device; a table that is only looked up takes none."""
        times = [_times(self.cpu, self.target, group, choice.format) for group in storage.groups]
        return replace(
            choice, decode_s=sum(decode for decode, _ in times), prefill_s=sum(prefill for _, prefill in times)
        )

    def all_timed(self, choices: Sequence[Sequence[Choice]]) -> list[list[Choice]]:
        """Return the choices of each storage with the time that they take on the device."""
        return [
            [self.timed(storage, choice) for choice in some]
            for storage, some in zip(self.storages, choices, strict=True)
        ]


def cpu_as_predicted(
    target: Budgeted, model: Model, storages: Sequence[Storage], device: DeviceProfile, backend: BackendName = "cpu"
) -> Cpu:
    """Return a device's CPU on which a model of 4 bits takes as long as `predict` says for a backend.

    Kernel speeds tell how formats differ on one device, predictions how fast the device is. How formats differ on a GPU
    or a neural processor is not known, so it is taken from the CPU.
    """
    plain, read, decode_s, prefill_s = target.processor(device), 0.0, 0.0, 0.0
    formats: Counter[str] = Counter()
    for group, options in ((group, storage.formats) for storage in storages for group in storage.groups):
        if group.site == TOKENS:
            continue
        format = min(options, key=lambda one: _unlike_most_runs(one, target.throughput(group, one)))
        decode, prefill = _times(plain, target, group, format)
        decode_s, prefill_s = decode_s + decode, prefill_s + prefill
        read += group.share * format.stored_bytes(group.rows, group.columns)
        formats[format.name] += 1
    # Predictions begin at a million parameters: a smaller model is taken so many times as large.
    active = model.decoder.active_parameters
    scale = max(1.0, LEAST_PARAMETERS / active, LEAST_BYTES / read)
    (usual, _) = formats.most_common(1)[0]
    request = Request(int(scale * read) + 1, int(scale * active) + 1, usual, backend)
    predicted = rates(device, checked_request(request, device))
    return replace(
        plain,
        decode_factor=1 / (predicted.decode.value * scale * decode_s),
        prefill_factor=1 / (predicted.prefill.value * scale * prefill_s),
    )


def _unlike_most_runs(format: WeightFormat, throughput: Throughput) -> tuple[float, float]:
    """Return how far a format is from those of most published runs: 4.5 bits, and of such the quickest."""
    return abs(8 * format.stored_bytes(1, 256) / 256 - 4.5), -throughput.decode


def _times(cpu: Cpu, target: Budgeted, group: WeightGroup, format: WeightFormat) -> tuple[float, float]:
    """Return the seconds of a matrix for a generated token and for one of a prompt, on average over tokens.

    They are zero if it is only looked up.
    """
    if group.site == TOKENS:
        return 0.0, 0.0
    throughput = target.throughput(group, format)
    stored = format.stored_bytes(group.rows, group.columns)
    decode_s, prefill_s = cpu.decode_s(group.size, stored, throughput), cpu.prefill_s(group.size, throughput)
    return group.share * decode_s, group.share * prefill_s


def decisions_of(budget: Budget, best: Sequence[Choice], model: Model, codes: str, reason: str) -> list[Decision]:
    """Return a decision for each weight group of a model, in its order, from one choice for each storage.

    Matrices take the codes of the source where the formats hold them.
    """
    formats = {
        group.name: choice.format
        for storage, choice in zip(budget.storages, best, strict=True)
        for group in storage.groups
    }
    return with_codes(model, [Decision(group, codes, formats[group.name], reason) for group in model.groups()])


def _set(limits: Limits) -> dict[str, float]:
    return {name: limit for name, limit in vars(limits).items() if limit != getattr(Limits(), name)}


def _limit_in_words(name: str, limit: float, fixed_bytes: int) -> str:
    if name == "bytes":
        return f"at most {int(limit + fixed_bytes):,} bytes"
    return f"at least {1 / limit:,.1f} tokens/s {'decoded' if name == 'decode_s' else 'prefilled'} (estimated)"


def stock_of_that_size(target: Budgeted, model: Model, most_bytes: int) -> list[Decision]:
    """Return what the stock tool makes of about as many bytes of matrices; empty where it makes nothing so small."""
    return target.stock(model, int(SAME_SIZE * most_bytes))


def require_feasible(budget: Budget) -> None:
    """Refuse limits that nothing keeps; needs no predictions.

    Raises:
        RequestError: nothing does; for each limit, what could be had if the others stayed, is named.
    """
    choices = budget.all_timed(
        [
            [Choice(format, stored_bytes(storage, format), 0.0) for format in storage.formats]
            for storage in budget.storages
        ]
    )
    if allocate(choices, budget.limits) is not None:
        return
    nearest = []
    for name in _set(budget.limits):
        relaxed = replace(budget.limits, **{name: getattr(Limits(), name)})
        found = allocate(choices, relaxed, attrgetter(name))
        if found is not None:
            least = sum(float(getattr(choice, name)) for choice in found)
            least *= 1 if name == "bytes" else 1 + ROUNDED
            nearest.append(_limit_in_words(name, least, budget.fixed_bytes))
    raise RequestError(
        "no choice of formats keeps the limits",
        got=budget.scheme,
        expected=" or ".join(nearest) or "limits that one choice can keep together",
        next_step="relax a limit to that",
    )


def cost_of_speed(budget: Budget, choices: Sequence[Sequence[Choice]], best: Sequence[Choice]) -> tuple[str, ...]:
    """Say what the least KL within the limits is, where a balanced choice is held far from it by its speed."""
    finest = allocate(choices, budget.limits) if budget.prefer == "balanced" else None
    if finest is None:
        return ()
    least, taken = (sum(choice.kl for choice in some) for some in (finest, best))
    if least > FAR_FROM_LEAST * taken:
        return ()
    prefill, decode = (
        sum(of(choice) for choice in best) / sum(of(choice) for choice in finest)
        for of in (attrgetter("prefill_s"), attrgetter("decode_s"))
    )
    return (
        "formats are held to the speed of what the stock tool makes of as many bytes: within the same limits "
        f"--prefer accuracy is expected to lose {least:.2g} nats instead of {taken:.2g}, on the calibration text, and "
        f"has {prefill:.2f} times the speed in prompts and {decode:.2f} times in answers (estimated)",
    )


def chosen(budget: Budget, choices: Sequence[Sequence[Choice]]) -> list[Choice]:
    """Return the choices that suit the preference best within the limits.

    `accuracy` takes the least predicted KL. `balanced` does so among choices that are not expected to be slower than
    what the stock tool makes of as many bytes, where there are any. `speed` takes the quickest that cost little more.

    Raises:
        RequestError: nothing keeps the limits.
    """
    balanced = None if budget.prefer == "accuracy" else allocate(choices, budget.no_slower_than_stock)
    best = balanced or allocate(choices, budget.limits)
    if best is None:
        raise RequestError("no choice of formats keeps the limits", next_step="raise the budget")
    if budget.prefer != "speed":
        return best
    most_kl = SPEED_KL * sum(choice.kl for choice in best)
    return allocate(choices, replace(budget.limits, kl=most_kl), _answer_s) or best


def _answer_s(choice: Choice) -> float:
    return PROMPT_TOKENS * choice.prefill_s + ANSWER_TOKENS * choice.decode_s
