"""plan.json: everything that was decided about a model, complete once the statistics are there.

A plan holds the recipe with every option of every step, and the format of each matrix with its predicted loss. With
the same model and texts it gives the same bundle again: `edge-exporter build MODEL --plan plan.json`. What this machine
needs for the build is not in it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import FailFast, Field

from exporter.compress.effort import Effort
from exporter.device.backend import BackendName
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError, RequestError
from exporter.foundation.quantities import Count, Document, Sha256, from_json

if TYPE_CHECKING:  # they bring torch along, which those who only read a plan do without
    from exporter.calibrate.windows import Windows
    from exporter.formats.format import LowRank, WeightFormat
    from exporter.formats.group import Decision, WeightGroup
    from exporter.planning.step import Draft

# That of 126 layers has 0.6 MB.
MOST_BYTES = 8 << 20
SCHEMA_VERSION = 1
VERSION = re.compile(rb'"schema_version": *([0-9]{1,9})')
Word = Annotated[str, Field(max_length=64)]
Sentence = Annotated[str, Field(max_length=1000)]
Nats = Annotated[float, Field(ge=0)]


class TextFacts(Document):
    """What may be said of a text that is private: how it came about, the SHA-256 of its tokens, and its size."""

    kind: Literal["file", "self-sampled"]
    digest: str
    tokens: Count
    bytes: Count

    @classmethod
    def of(cls, windows: "Windows") -> "TextFacts":
        """Return the facts of a text."""
        return cls(kind=windows.kind, digest=windows.digest, tokens=windows.tokens.size, bytes=windows.source_bytes)


class RecipeDocument(Document):
    """A recipe in which every option of every step is stated; see `exporter.planning.recipe`.

    Attributes:
        name: The recipe's name; None where options on the command line are all there is.
        title: One line for people.
        steps: The options of each step, in order; `method` names the step.
        effort: The name of the effort level.
        spends: What that level spends.
    """

    name: Annotated[str, Field(max_length=255)] | None
    title: Sentence
    steps: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=16)]
    effort: Word
    spends: Effort


class Factors(Document):
    """Low-rank factors beside a matrix."""

    rank: Annotated[int, Field(ge=1, le=1 << 16)]
    format: Word

    @classmethod
    def of(cls, low_rank: "LowRank | None") -> "Factors | None":
        """Return what a plan says of factors; None where there are none."""
        return None if low_rank is None else cls(rank=low_rank.rank, format=low_rank.format.name)


class PlannedMatrix(Document):
    """The decision on one matrix.

    Attributes:
        name: Tensor name in the source model.
        format: The weight format's name.
        factors: Low-rank factors beside it, or those of an adapter; None for none.
        method: The method that chooses codes.
        reason: Why this format, for people.
        calibration_kl: KL divergence a token, in nats, that it is predicted to add on the calibration text.
        evaluation_kl: The same on the evaluation text.
    """

    name: Annotated[str, Field(max_length=1000)]
    format: Word
    factors: Factors | None = None
    method: Word
    reason: Sentence
    calibration_kl: Nats
    evaluation_kl: Nats

    @property
    def stored_as(self) -> str:
        """The format's name, with rank and format of the factors where there are any: `Q4_0+r32-Q8_0`."""
        return self.format if self.factors is None else f"{self.format}+r{self.factors.rank}-{self.factors.format}"

    @classmethod
    def of(cls, decision: "Decision") -> "PlannedMatrix":
        """Return a final decision."""
        return cls(
            name=decision.group.name,
            format=decision.format.name,
            factors=Factors.of(decision.beside),
            method=decision.method,
            reason=decision.reason,
            calibration_kl=decision.calibration_kl or 0.0,
            evaluation_kl=decision.predicted_kl or 0.0,
        )


class Plan(Document):
    """What a build does.

    Attributes:
        model_digest: SHA-256 over the source's files.
        device: Name of the device profile.
        device_digest: SHA-256 over the profile's content.
        ram_bytes: Installed memory of the device; None where the plan takes the profile's own.
        backend: The processor and interface that computes on the device; None in plans of earlier versions: the CPU.
        target: Name of the target.
        recipe: The steps with every option, and the effort.
        seed: Seed of everything random.
        window: Tokens of a window in calibration and evaluation.
        context: Tokens of context that memory and speed are stated for.
        calibration: The text that statistics come from.
        evaluation: The text that accuracy is measured on.
        evaluation_windows: Its windows.
        matrices: A decision for each weight group, in the model's order.
        notes: Sentences on what other options would give.
        adapter: `keep` for an adapter that is kept beside its base; None for any other model.
    """

    schema_version: Literal[1] = 1
    model_digest: Sha256
    device: Annotated[str, Field(max_length=255)]
    device_digest: Sha256
    ram_bytes: Annotated[int | None, Field(ge=1, le=1 << 50, exclude_if=lambda size: size is None)] = None
    backend: Annotated[BackendName | None, Field(exclude_if=lambda name: name is None)] = None
    target: Word
    recipe: RecipeDocument
    seed: Count
    window: Annotated[int, Field(ge=1, le=1 << 20)]
    context: Annotated[int, Field(ge=1, le=1 << 30)]
    calibration: TextFacts
    evaluation: TextFacts
    evaluation_windows: Annotated[int, Field(ge=1, le=1 << 16)]
    matrices: Annotated[tuple[PlannedMatrix, ...], FailFast(), Field(min_length=1, max_length=1 << 16)]
    notes: Annotated[tuple[Sentence, ...], Field(max_length=100)] = ()
    adapter: Annotated[Literal["keep"] | None, Field(exclude_if=lambda use: use is None)] = None

    def decisions(
        self, draft: "Draft", alternatives: "Callable[[WeightGroup], Sequence[WeightFormat]]"
    ) -> "list[Decision]":
        """Return the decisions for the weight groups that the plan's recipe was drafted for.

        Args:
            draft: What the recipe decides before statistics.
            alternatives: Returns the formats that the target may give a matrix besides.

        Raises:
            InputError: the plan does not decide each matrix once, or decides what its own recipe cannot.
        """
        names = [one.name for one in self.matrices]
        if names != [one.group.name for one in draft.decisions]:
            raise _not_each_once(names, [one.group.name for one in draft.decisions])
        formats = {one.group.name: {one.format.name: one.format} for one in draft.decisions}
        for storage in draft.storages:
            formats |= {group.name: {one.name: one for one in storage.formats} for group in storage.groups}
        for drafted in draft.decisions:
            formats[drafted.group.name] |= {format.name: format for format in alternatives(drafted.group)}
        decided = []
        for one, drafted in zip(self.matrices, draft.decisions, strict=True):
            factors, methods = Factors.of(drafted.beside), draft.methods or (drafted.method,)
            if one.format not in formats[one.name] or one.factors != factors or one.method not in methods:
                raise InputError(
                    "the plan decides what its own recipe cannot",
                    where=shown(one.name),
                    got=_words(one.format, one.factors, one.method),
                    expected=_words(" or ".join(formats[one.name]), factors, " or ".join(methods)),
                    next_step="make a new plan with edge-exporter build",
                )
            format = formats[one.name][one.format]
            decided.append(replace(drafted, method=one.method, format=format, reason=one.reason))
        return decided

    def require_text(self, title: str, found: "Windows") -> None:
        """Refuse a text that is not the plan's.

        Args:
            title: `calibration` or `evaluation`.
            found: The text.

        Raises:
            InputError: it is another one.
        """
        planned: TextFacts = getattr(self, title)
        if found.digest != planned.digest:
            raise InputError(
                f"the plan was made on another {title} text",
                got=f"{found.kind}, {found.tokens.size:,} tokens, SHA-256 {found.digest[:16]}",
                expected=f"{planned.kind}, {planned.tokens:,} tokens, SHA-256 {planned.digest[:16]}",
                next_step=f"give that text with --{title}, or make a new plan",
            )


def _words(format: str, factors: Factors | None, method: str) -> str:
    return f"{format}{'' if factors is None else f' and factors {factors.format} of rank {factors.rank}'} by {method}"


def _not_each_once(planned: Sequence[str], present: Sequence[str]) -> InputError:
    missing = [name for name in present if name not in set(planned)]
    unknown = [name for name in planned if name not in set(present)]
    fault = (
        f"none for {missing[0]}" if missing else f"one for {unknown[0]}" if unknown else "another order, or one twice"
    )
    return InputError(
        "the plan does not decide each matrix of the model once", where="matrices", got=shown(fault),
        expected=f"{len(present)} decisions in the model's order", next_step="make a new plan with edge-exporter build",
    )  # fmt: skip


def read_plan(path: Path) -> Plan:
    """Return the plan in a file.

    Raises:
        RequestError: there is no such file.
        InputError: it is too large, or no plan of this version.
    """
    if not path.is_file():
        raise RequestError("there is no such file", where=path, next_step="give the plan.json of a bundle")
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError("the plan cannot be read", where=path, got=error.strerror) from error
    if len(text) > MOST_BYTES:
        raise InputError("the plan is too large", where=path, expected=f"at most {MOST_BYTES:,} bytes")
    found = VERSION.search(text)
    if found is not None and int(found[1]) > SCHEMA_VERSION:
        raise InputError(
            "the plan is of a newer schema", where=path, got=f"version {int(found[1])}", expected=SCHEMA_VERSION,
            next_step="use the version of edge-exporter that made it",
        )  # fmt: skip
    return from_json(Plan, text, path)
