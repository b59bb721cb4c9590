"""Recipes: what is done to a model, step by step, named or in a TOML file of the user's own.

    schema_version = 1
    title = "Two bits, and factors for what they miss"

    [[step]]
    method = "caldera"
    bits = 2
    rank = 64

Steps that make the model smaller come first, then at most one that gives every matrix its format, then at most one that
codes the files to be shipped. A step's `method` is a file of `exporter.steps`; its other keys are that step's options.
Files are hostile until checked, as those of devices are.
"""

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from exporter.calibrate.layer_stream import Progress
from exporter.coding.chunk import Profile
from exporter.compress.caldera import ALTERNATION, Alternation
from exporter.device.provenance import Text
from exporter.foundation.config_files import checked, named_file, read_document, shown
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.foundation.quantities import Document
from exporter.foundation.registry import load, names
from exporter.model.model import Model
from exporter.plan.step import EncodingStep, Observe, PruningStep, RewritingStep
from exporter.steps.transport import Transport

PACKAGE = "exporter.recipes"
STEPS = "exporter.steps"
MOST_STEPS = 16
Step = RewritingStep | EncodingStep | Transport


class _File(Document):
    """A recipe's file; each step is checked by its own schema."""

    schema_version: Literal[1]
    title: Text
    step: tuple[dict[str, Any], ...] = Field(strict=False, min_length=1, max_length=MOST_STEPS)


@dataclass(frozen=True)
class Recipe:
    """Steps in order; without any, the job's own choices are all that is done.

    Attributes:
        name: The file's name without `.toml`.
        title: One line for people.
        rewriting: Steps that give a smaller model.
        encoding: The step that gives every matrix its format; None leaves that to the job's type or limits.
        transport: The profile that model files are coded with, where they are shipped coded: the last step.
    """

    name: str
    title: str
    rewriting: tuple[RewritingStep, ...] = ()
    encoding: EncodingStep | None = None
    transport: Profile | None = None

    @property
    def alternation(self) -> Alternation:
        """How matrices and their factors alternate."""
        return ALTERNATION if self.encoding is None else self.encoding.alternation

    def outlined(self, model: Model) -> Model:
        """Return a model of the shape that the rewriting steps give; reads no weights.

        Raises:
            RequestError: a step cannot be done to this model.
        """
        return reduce(lambda given, step: step.outlined(given), self.rewriting, model)

    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Return the model that the rewriting steps give; for arguments see `RewritingStep.rewritten`."""
        return reduce(lambda given, step: step.rewritten(given, observe, progress), self.rewriting, model)


NO_RECIPE = Recipe("none", "nothing but what the job names")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the exporter, sorted."""
    return names(PACKAGE, suffix=".toml")


def step_names() -> list[str]:
    """Return the names of the steps, sorted."""
    return names(STEPS)


def load_recipe(name_or_path: str) -> Recipe:
    """Return a named recipe, or the one in the user's own TOML file.

    Args:
        name_or_path: A name of `recipe_names()`, or a path: it ends with `.toml` or contains a separator.

    Raises:
        RequestError: no such recipe, file or step, or an order of steps that cannot work.
        InputError: the file is no recipe.
    """
    file = named_file(name_or_path, PACKAGE, "recipe")
    found = read_document(file, _File, "recipe")
    steps = [_step(table, f"{file}: step {number}") for number, table in enumerate(found.step, 1)]
    for number, (before, step) in enumerate(pairwise(steps), 2):
        _require_order(before, step, f"{file}: step {number}")
    return Recipe(
        file.name.removesuffix(".toml"),
        found.title,
        tuple(step for step in steps if isinstance(step, RewritingStep)),
        next((step for step in steps if isinstance(step, EncodingStep)), None),
        next((step.profile for step in steps if isinstance(step, Transport)), None),
    )


def _require_order(before: Step, step: Step, where: str) -> None:
    if isinstance(before, Transport):
        raise RequestError(
            "transport codes the finished model files, so nothing can follow it",
            where=where,
            got=f"{step.method} after it",
            next_step="make transport the last step",
        )
    if isinstance(before, EncodingStep) and not isinstance(step, Transport):
        first = f"put {step.method} before {before.method}" if isinstance(step, RewritingStep) else "leave one out"
        raise RequestError(
            f"{before.method} gives every matrix its codes, so {step.method} cannot follow it",
            where=where,
            got=f"{before.method}, then {step.method}",
            next_step=first,
        )
    if isinstance(before, PruningStep) and isinstance(step, PruningStep):
        raise RequestError(
            "a model is pruned once",
            where=where,
            got=f"{before.method}, then {step.method}",
            next_step="leave one out and choose the ratio of the other",
        )


def _step(table: dict[str, Any], where: str) -> Step:
    method = table.get("method")
    known = step_names()
    if not isinstance(method, str):
        expected = f"one of {', '.join(known)}"
        raise InputError("a step must name its method", where=where, got=shown(method), expected=expected)
    if method not in known:
        raise InputError(f"unknown method {shown(method)}", where=where, next_step=did_you_mean(method, known))
    kind: type[Step] = load(f"{STEPS}.{{}}", method, known, "method").STEP
    return checked(table, kind, where)
