"""From a job to what it works with: the recipe that its options stand for, the profile, the target, the models."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from exporter.calibrate.layer_stream import Progress as StepProgress
from exporter.calibrate.windows import Windows
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.checks import check_methods
from exporter.compress.effort import DEFAULT, Effort, effort
from exporter.device.memory_size import device_with
from exporter.device.profile import DeviceProfile
from exporter.formats.group import Decision
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.foundation.quantities import Basis, Check
from exporter.model.lora import MERGE_INSTEAD
from exporter.model.model import Model
from exporter.planning.job import Job
from exporter.planning.plan import Plan, PlannedMatrix, TextFacts
from exporter.planning.recipe import Recipe, Table, load_recipe, step_of
from exporter.planning.step import Draft, EncodingStep, EncodingTask
from exporter.steps.transport import Transport
from exporter.targets.backends import BackendFormats, formats_on
from exporter.targets.contract import AsStored, Target, load_target, with_adapter

# The context of Llama 3.1 to 3.3: what most models for long texts were made for.
MOST_POSITIONS_UNASKED = 131_072
PREFERENCES = ("balanced", "accuracy", "speed")


@dataclass(frozen=True)
class ResolvedJob:
    """A job with everything that its names stand for; reads no weights.

    Attributes:
        job: What is asked for, with windows no longer than the model's context.
        recipe: The steps, with one that gives matrices their formats, and every option.
        original: The source, with any adapter merged: what the artifact is compared with.
        pruned: What the rewriting steps leave of it: only its shape, until they were run. Of an adapter that is kept,
            the base with the adapter beside it.
        shape: How the shape of `pruned` is known.
        stored: `pruned` as the target's files can hold it.
        device: The profile.
        target: The target, on that device.
        backend: What computes there, and the formats that it computes as they are.
        text_checks: How the runtime treats the tokenizer and the chat template.
    """

    job: Job
    recipe: Recipe
    original: Model
    pruned: Model
    shape: Basis
    stored: AsStored
    device: DeviceProfile
    target: Target
    backend: BackendFormats
    text_checks: tuple[Check, ...] = ()

    @property
    def effort(self) -> Effort:
        """How much work goes into a smaller loss."""
        return self.recipe.spends

    @property
    def model(self) -> Model:
        """The model whose matrices are encoded."""
        return self.stored.model

    @property
    def unrewritten(self) -> Model:
        """The model whose matrices are encoded, before any rewriting: the source, or the base of an adapter kept."""
        return self.original.base or self.original

    @property
    def prediction_windows(self) -> int:
        """Windows of the evaluation text that the loss of formats is predicted on."""
        return min(self.job.evaluation_windows, self.effort.prediction_windows)

    @property
    def encoding(self) -> EncodingStep:
        """The step that gives every matrix its format."""
        encoding = self.recipe.encoding
        assert encoding is not None
        return encoding

    def draft(self) -> Draft:
        """Return what is decided before statistics; reads no weights.

        Raises:
            RequestError: the target or the model cannot hold what the recipe asks for.
            InputError: the plan that is repeated does not fit its own recipe.
        """
        task = EncodingTask(self.original, self.model, self.device, self.target, self.backend, self.effort)
        draft = self.encoding.draft(task)
        draft = draft.with_adapter(with_adapter(self.target, self.model, draft.decisions))
        self.backend.require(draft.decisions, self.target, self.model)
        check_methods(draft.decisions, self.model)
        if self.job.repeats is not None and (not self.recipe.rewriting or self.shape == "measured"):
            self._repeated(self.job.repeats, draft)
        return draft

    def decided(self, draft: Draft, given: Rewritten, progress: StepProgress) -> tuple[list[Decision], tuple[str, ...]]:
        """Return the final decisions and the notes: those of the plan that is repeated, or else the recipe's.

        Args:
            draft: The decisions before statistics.
            given: The model in the coordinates that it is encoded in, and its statistics on the calibration text.
            progress: Called with matrices done and their total.
        """
        if self.job.repeats is None:
            decisions, notes = draft.decided(given, progress)
            decisions = self._reconsidered(draft, given, decisions)
            return with_adapter(self.target, given.model, decisions), notes
        return self._repeated(self.job.repeats, draft), self.job.repeats.notes

    def _repeated(self, plan: Plan, draft: Draft) -> list[Decision]:
        """Return the decisions of a plan.

        Raises:
            InputError: they do not fit the plan's own recipe.
            RequestError: the model has no such codes.
        """
        decisions = plan.decisions(draft, self.target.alternatives)
        check_methods(decisions, self.model)
        stored = sum(one.stored_bytes for one in decisions)
        if stored > draft.most_matrix_bytes:
            raise InputError(
                "the plan's formats exceed its own budget",
                where="matrices",
                got=f"{stored:,} bytes",
                expected=f"at most {draft.most_matrix_bytes:,.0f}",
                next_step="make a new plan with edge-exporter build",
            )
        return decisions

    def _reconsidered(self, draft: Draft, given: Rewritten, decisions: list[Decision]) -> list[Decision]:
        """Return the decisions as the target reconsiders them, if the backend and the limits allow that."""
        changed = self.target.reconsidered(given, decisions)
        allowed = sum(one.stored_bytes for one in changed) <= draft.most_matrix_bytes
        return changed if allowed and not self.backend.lacking(changed) else decisions

    def scheme(self, draft: Draft) -> str:
        """Return the recipe's name and the formats, in words."""
        named = [] if self.recipe.name is None else [f"recipe {self.recipe.name}"]
        return ", ".join([*named, *([draft.scheme] if draft.scheme else [])])

    def plan(
        self, decisions: Sequence[Decision], notes: Sequence[str], calibration: Windows, evaluation: Windows
    ) -> Plan:
        """Return the finished plan.

        Args:
            decisions: The final ones, with their predicted losses.
            notes: Sentences on what other options would give.
            calibration: The text that statistics come from.
            evaluation: The text that accuracy is measured on.
        """
        return Plan(
            model_digest=self.original.digest,
            device=self.device.name,
            device_digest=self.device.digest,
            ram_bytes=self.job.ram_bytes,
            backend=self.backend.name,
            target=self.target.name,
            recipe=self.recipe.document,
            seed=self.job.seed,
            window=self.job.window,
            context=self.job.context,
            calibration=TextFacts.of(calibration),
            evaluation=TextFacts.of(evaluation),
            evaluation_windows=self.job.evaluation_windows,
            matrices=tuple(map(PlannedMatrix.of, decisions)),
            notes=tuple(dict.fromkeys(notes)),
            adapter=None if self.original.base is None else "keep",
        )

    def with_text(self, checks: Sequence[Check], notes: Iterable[str]) -> "ResolvedJob":
        """Return the job with what is known of how the artifact treats text."""
        return replace(self, original=self.original.noting(notes), text_checks=tuple(checks))

    def with_rewritten(self, model: Model) -> "ResolvedJob":
        """Return the job with the model that the rewriting steps gave."""
        return replace(self, pruned=model, shape="measured", stored=self.target.as_stored(model))


def resolve(job: Job, model: Model) -> ResolvedJob:
    """Return the job with everything that its names stand for; reads no weights.

    Raises:
        RequestError: the device, target, type, method or recipe is unknown, or they do not go together, or the context
            is longer than the model's, or than the target computes for it.
        InputError: the job repeats a plan for another model or device.
    """
    _require_in_context(job.context, model.decoder.context_length, "the model's")
    if job.device is None:
        raise RequestError("no device is named", next_step="name one with --device; edge-exporter devices lists them")
    device = device_with(job.device, job.ram_bytes)
    target = load_target(device.preferred.target if job.target == "auto" else job.target).on(device)
    backend = formats_on(device.backend(job.backend or device.preferred.backend).name, target.name)
    longest = target.context_length(model)
    _require_in_context(job.context, longest, f"the target {target.name} computes for this model")
    job, model = replace(job, window=min(job.window, longest)), for_context(model, job.context, longest)
    if job.repeats is None:
        recipe = recipe_for(job, target)
    else:
        _require_same(job.repeats, model, device)
        recipe = Recipe.of(job.repeats.recipe)
    pruned = recipe.outlined(model) if model.base is None else _beside_adapter(model.base, recipe)
    stored = target.as_stored(pruned)
    if pruned.ranks() and not stored.model.ranks():
        raise RequestError(
            "the target's files hold the base in another shape than the adapter was made for", got=stored.how,
            next_step=MERGE_INSTEAD,
        )  # fmt: skip
    return ResolvedJob(job, recipe, model, pruned, "estimated", stored, device, target, backend)


def _beside_adapter(base: Model, recipe: Recipe) -> Model:
    """Return the base of an adapter that is kept beside it.

    Raises:
        RequestError: a step of the recipe would change the base's shape or weights, which the adapter was made for.
    """
    if recipe.rewriting:
        raise RequestError(
            f"the step {recipe.rewriting[0].method} changes the base, which the adapter beside it was made for",
            expected="a recipe without such a step", next_step=f"choose another recipe, or {MERGE_INSTEAD}",
        )  # fmt: skip
    return base


def _require_in_context(context: int, longest: int, whose: str) -> None:
    if context > longest:
        raise RequestError(f"the context is longer than {whose}", got=context, expected=f"at most {longest}")


def for_context(model: Model, context: int, longest: int) -> Model:
    """Return the model for no more positions than are usual, or than are asked for: tables of positions take room.

    Args:
        model: The model.
        context: What is asked for.
        longest: The most that the target computes for this model.
    """
    usual, known = max(context, MOST_POSITIONS_UNASKED), model.decoder.context_length
    bounded = min(longest, usual)
    if known <= bounded:
        return model
    why = "--context asks for more" if usual < longest else "this target computes no more of them as the model does"
    note = f"the artifact is made for {bounded:,} of the model's {known:,} positions; {why}"
    decoder = replace(model.decoder, positions=bounded)
    base = None if model.base is None else replace(model.base, decoder=decoder)
    return replace(model, decoder=decoder, base=base, warnings=(*model.warnings, note))


def recipe_for(job: Job, target: Target) -> Recipe:
    """Return the recipe that a job's options stand for, with the target's defaults in place of what is left open.

    `--type` and `--method` are short for a step `named-type`; the limits and `--prefer` for a step `allocate`;
    `--transport` for a step `transport` at the end. `--effort` sets the recipe's.

    Raises:
        RequestError: options decide the same thing twice, or have no effect; or a name is unknown.
    """
    given = None if job.recipe is None else load_recipe(job.recipe)
    _require_no_conflict(job, given)
    rewriting = () if given is None else given.rewriting
    encoding = None if given is None else given.encoding
    if encoding is None:
        step = step_of(_encoding_table(job), "the options")
        assert isinstance(step, EncodingStep)
        encoding = step
    profile = job.transport or (None if given is None else given.transport)
    transport = () if profile is None else (Transport(method="transport", profile=profile),)
    level = job.effort or (DEFAULT if given is None else given.effort)
    spends = effort(level)
    if job.calibration_windows is not None:
        spends = replace(spends, calibration_windows=job.calibration_windows)
    name, title = (None, "as the options say") if given is None else (given.name, given.title)
    return Recipe(name, title, (*rewriting, encoding.resolved(target), *transport), level, spends)


def _encoding_table(job: Job) -> Table:
    """Return the options of the step that the job's options stand for."""
    limits = {
        "max_file_bytes": job.max_file_bytes,
        "bits": job.bits,
        "min_decode": job.min_decode_tokens_per_s,
        "min_prefill": job.min_prefill_tokens_per_s,
    }
    if job.prefer != "balanced" or any(limit is not None for limit in limits.values()):
        named = {"method": "allocate", **limits, "prefer": job.prefer, "codes": job.method}
    else:
        named = {"method": "named-type", "type": job.type, "codes": job.method}
    return {key: value for key, value in named.items() if value is not None}


def _require_no_conflict(job: Job, recipe: Recipe | None) -> None:
    """Refuse options that decide the same thing twice, or that have no effect.

    Raises:
        RequestError: they are named.
    """
    if job.prefer not in PREFERENCES:
        raise RequestError(f"unknown preference {job.prefer!r}", next_step=did_you_mean(job.prefer, PREFERENCES))
    if job.save_pruned is not None and (recipe is None or not recipe.rewriting):
        raise RequestError(
            "there is no pruned model to save",
            where="--save-pruned",
            next_step="name a recipe that prunes, such as --recipe prunenet",
        )
    if job.transport is not None and recipe is not None and recipe.transport is not None:
        raise RequestError(
            "--transport and the recipe's step transport contradict each other", where=job.recipe,
            next_step="leave out --transport",
        )  # fmt: skip
    encodes = recipe is not None and recipe.encoding is not None
    limits = {
        "--max-file-bytes": job.max_file_bytes is not None,
        "--bits": job.bits is not None,
        "--min-decode": job.min_decode_tokens_per_s is not None,
        "--min-prefill": job.min_prefill_tokens_per_s is not None,
        f"--prefer {job.prefer}": job.prefer != "balanced",
    }
    options = {"--recipe": encodes, "--type": job.type is not None}
    if encodes:
        options["--method"] = job.method is not None
    named = [option for option, given in {**options, **limits}.items() if given]
    alone = {"--recipe", "--type"} & set(named)
    if len(named) > 1 and (alone or {"--max-file-bytes", "--bits"} <= set(named)):
        raise RequestError(f"{' and '.join(named)} contradict each other", next_step="name only one of them")


def _require_same(plan: Plan, model: Model, device: DeviceProfile) -> None:
    if model.digest != plan.model_digest:
        raise InputError(
            "the plan was made for another model", where=model.name, got=f"SHA-256 {model.digest[:16]}",
            expected=f"SHA-256 {plan.model_digest[:16]}", next_step="give that model, or make a new plan",
        )  # fmt: skip
    if (device.name, device.digest) != (plan.device, plan.device_digest):
        raise InputError(
            "the plan was made for another device profile", where=device.name,
            got=f"{device.name}, SHA-256 {device.digest[:16]}",
            expected=f"{plan.device}, SHA-256 {plan.device_digest[:16]}",
            next_step="give that profile with --device, or make a new plan",
        )  # fmt: skip
