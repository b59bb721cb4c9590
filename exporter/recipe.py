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

from exporter.compress.caldera import Turns
from exporter.device.profile import Text
from exporter.errors import InputError, RequestError, did_you_mean
from exporter.measures import Document
from exporter.model.model import Model
from exporter.registry import load, names
from exporter.steps.step import EncodingStep
from exporter.targets.target import Target
from exporter.toml import checked, named_file, read_document, shown
from exporter.weights.group import Decision

PACKAGE = "exporter.recipes"
STEPS = "exporter.steps"
NOT_STEPS = {"step"}
MOST_STEPS = 16


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
        encoding: The last step, which gives every matrix its format.
    """

    name: str
    title: str
    encoding: EncodingStep

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
    step, *after = (_step(table, f"{file}: step {number}") for number, table in enumerate(found.step, 1))
    if after:
        raise RequestError(
            f"{step.method} gives every matrix its codes, so nothing can follow it",
            where=f"{file}: step 1",
            got=f"{after[0].method} after it",
            next_step=f"make {step.method} the last step",
        )
    return Recipe(file.name.removesuffix(".toml"), found.title, step)


def _step(table: dict[str, Any], where: str) -> EncodingStep:
    method = table.get("method")
    known = step_names()
    if not isinstance(method, str):
        expected = f"one of {', '.join(known)}"
        raise InputError("a step must name its method", where=where, got=shown(method), expected=expected)
    if method not in known:
        raise InputError(f"unknown method {shown(method)}", where=where, next_step=did_you_mean(method, known))
    kind: type[EncodingStep] = load(f"{STEPS}.{{}}", method, known, "method").STEP
    return checked(table, kind, where)
