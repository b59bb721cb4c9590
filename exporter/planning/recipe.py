"""Recipes: what is done to a model, step by step, named or in a TOML file of the user's own.

    schema_version = 1
    title = "Two bits, and low-rank factors for the error"
    effort = "max"

    [[step]]
    method = "caldera"
    bits = 2
    rank = 64

Steps that make the model smaller come first, then at most one that gives every matrix its format, then at most one that
codes the files for transport. A step's `method` is a file of `exporter.steps`; its other keys are that step's options.
Files are hostile until checked, as those of devices are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field

from exporter.calibrate.layer_stream import Progress
from exporter.coding.profiles import Profile
from exporter.compress.effort import DEFAULT, Effort, effort
from exporter.device.provenance import Text
from exporter.foundation.config_files import checked, named_file, read_document, shown
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.foundation.quantities import Document
from exporter.foundation.registry import load, names
from exporter.model.model import Model
from exporter.planning.plan import RecipeDocument
from exporter.planning.step import EncodingStep, Observe, PruningStep, RewritingStep
from exporter.steps.transport import Transport

PACKAGE = "exporter.recipes"
STEPS = "exporter.steps"
MOST_STEPS = 16
Step = RewritingStep | EncodingStep | Transport
Table = dict[str, Any]


class _File(Document):
    """A recipe's file; each step is checked by its own schema."""

    schema_version: Literal[1]
    title: Text
    effort: Text = DEFAULT
    step: tuple[Table, ...] = Field(strict=False, min_length=1, max_length=MOST_STEPS)


def step_of(table: Table, where: object) -> Step:
    """Return the step that a table of options describes.

    Args:
        table: Its `method` and options.
        where: Where the table stands, for messages.

    Raises:
        InputError: there is no such step, or it has no such options.
    """
    method = table.get("method")
    known = step_names()
    if not isinstance(method, str):
        expected = f"one of {', '.join(known)}"
        raise InputError("a step must name its method", where=where, got=shown(method), expected=expected)
    if method not in known:
        raise InputError(f"unknown method {shown(method)}", where=where, next_step=did_you_mean(method, known))
    kind: type[Step] = load(f"{STEPS}.{{}}", method, known, "method").STEP
    return checked(table, kind, where)


@dataclass(frozen=True)
class Recipe:
    """What is done to a model: steps in order, and the effort.

    Attributes:
        name: The file's name without `.toml`; None where options on the command line are all there is.
        title: One line for people.
        steps: The steps, in order.
        effort: The name of the effort level.
        spends: What that level spends.
    """

    name: str | None
    title: str
    steps: tuple[Step, ...]
    effort: str
    spends: Effort

    @classmethod
    def of(cls, document: RecipeDocument) -> "Recipe":
        """Return the recipe that a document states.

        Raises:
            InputError: it has a step or an option that does not exist, or no step that gives matrices their formats.
            RequestError: its steps are in an order that cannot work.
        """
        steps = _ordered([dict(table) for table in document.steps], "recipe.steps")
        if not any(isinstance(step, EncodingStep) for step in steps):
            raise InputError("no step of the recipe gives matrices their formats", where="recipe.steps")
        return cls(document.name, document.title, steps, document.effort, document.spends)

    @property
    def document(self) -> RecipeDocument:
        """The recipe with every option of every step."""
        return RecipeDocument(
            name=self.name,
            title=self.title,
            steps=tuple(step.model_dump(mode="json") for step in self.steps),
            effort=self.effort,
            spends=self.spends,
        )

    @property
    def rewriting(self) -> tuple[RewritingStep, ...]:
        """The steps that give a smaller model."""
        return tuple(step for step in self.steps if isinstance(step, RewritingStep))

    @property
    def encoding(self) -> EncodingStep | None:
        """The step that gives every matrix its format; None where a recipe leaves that to other options."""
        return next((step for step in self.steps if isinstance(step, EncodingStep)), None)

    @property
    def transport(self) -> Profile | None:
        """The profile that model files are coded with, where they are shipped coded."""
        return next((step.profile for step in self.steps if isinstance(step, Transport)), None)

    def outlined(self, model: Model) -> Model:
        """Return a model of the shape that the rewriting steps give; reads no weights.

        Raises:
            RequestError: a step cannot be applied to this model.
        """
        return reduce(lambda given, step: step.outlined(given), self.rewriting, model)

    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Return the model that the rewriting steps give; for arguments see `RewritingStep.rewritten`."""
        return reduce(lambda given, step: step.rewritten(given, observe, progress), self.rewriting, model)


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
        RequestError: no such recipe, file, step or effort, or an order of steps that cannot work.
        InputError: the file is no recipe.
    """
    file = named_file(name_or_path, PACKAGE, "recipe")
    found = read_document(file, _File, "recipe")
    steps = _ordered(found.step, f"{file}: step")
    return Recipe(file.name.removesuffix(".toml"), found.title, steps, found.effort, effort(found.effort))


def _ordered(tables: Sequence[Table], where: str) -> tuple[Step, ...]:
    steps = tuple(step_of(table, f"{where} {number}") for number, table in enumerate(tables, 1))
    for number, (before, step) in enumerate(pairwise(steps), 2):
        _require_order(before, step, f"{where} {number}")
    return steps


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
