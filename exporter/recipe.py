"""Recipes: what is done to a model, step by step, named or in a TOML file of the user's own.

    schema_version = 1
    title = "Two bits, and factors for what they miss"

    [[step]]
    method = "caldera"
    bits = 2
    rank = 64

A step's `method` is a file of `exporter.steps`; its other keys are that step's options. Files are hostile until
checked, as those of devices are.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from exporter.coding.chunk import Profile
from exporter.compress.caldera import Turns
from exporter.device.profile import Text
from exporter.errors import InputError, RequestError, did_you_mean
from exporter.measures import Document
from exporter.model.model import Model
from exporter.registry import load, names
from exporter.steps.step import EncodingStep
from exporter.steps.transport import Transport
from exporter.targets.target import Target
from exporter.toml import checked, named_file, read_document, shown
from exporter.weights.group import Decision

PACKAGE = "exporter.recipes"
STEPS = "exporter.steps"
NOT_STEPS = {"step"}
MOST_STEPS = 16

Step = EncodingStep | Transport


class _File(Document):
    """A recipe's file; each step is checked by its own schema."""

    schema_version: Literal[1]
    title: Text
    step: tuple[dict[str, Any], ...] = Field(strict=False, min_length=1, max_length=MOST_STEPS)


@dataclass(frozen=True)
class Recipe:
    """Steps in order.

    Attributes:
        name: The file's name without `.toml`.
        title: One line for people.
        encoding: The step which gives every matrix its format.
        transport: The profile that model files are coded with, where they are shipped coded: the last step.
    """

    name: str
    title: str
    encoding: EncodingStep
    transport: Profile | None = None

    @property
    def turns(self) -> Turns:
        """How matrices and their factors take turns."""
        return self.encoding.turns

    def decide(self, model: Model, target: Target) -> list[Decision]:
        """Return a decision for each weight group; reads no weights.

        Raises:
            RequestError: the target or the model cannot carry what a step asks for.
        """
        return self.encoding.decide(model, target)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the exporter, sorted."""
    return names(PACKAGE, suffix=".toml")


def step_names() -> list[str]:
    """Return the names of the steps, sorted."""
    return [name for name in names(STEPS) if name not in NOT_STEPS]


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
    (step, *after), profile = _coded_last(steps, file)
    if after:
        raise RequestError(
            f"{step.method} gives every matrix its codes, so nothing can follow it",
            where=f"{file}: step 1",
            got=f"{after[0].method} after it",
            next_step=f"make {step.method} the last step",
        )
    return Recipe(file.name.removesuffix(".toml"), found.title, step, profile)


def _coded_last(steps: list[Step], file: object) -> tuple[list[EncodingStep], Profile | None]:
    """Return the steps before the one that codes the finished files, and its profile; None where there is none."""
    before = [step for step in steps if isinstance(step, EncodingStep)]
    for number, step in enumerate(steps, 1):
        if isinstance(step, Transport) and number < len(steps):
            raise RequestError(
                "transport codes the finished model files, so nothing can follow it",
                where=f"{file}: step {number}",
                got=f"{steps[number].method}, which would change what was coded",
                next_step="make transport the last step",
            )
    if not before:
        raise RequestError(
            "transport codes model files, and no step before it makes any",
            where=f"{file}: step 1",
            next_step="put a step before it that gives matrices their formats, such as double",
        )
    last = steps[-1]
    return before, last.profile if isinstance(last, Transport) else None


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
