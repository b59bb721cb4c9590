"""Fitted constants as data: each with its basis, what it was fitted on, and the command to run for each candidate."""

from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import Field

from exporter.foundation.config_files import read_document
from exporter.foundation.quantities import Basis, Document

FILE = "fitted.toml"
Text = Annotated[str, Field(min_length=1, max_length=1000)]


class FittedConstant(Document):
    """A number that experiments chose.

    Attributes:
        value: The number.
        meaning: What it is.
        basis: How it is known.
        on: What it was fitted on, and what other values did.
        command: The command that shows how good a value is.
        date: When it was fitted.
    """

    value: float
    meaning: Text
    basis: Basis
    on: Text
    command: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class _File(Document):
    schema_version: Literal[1]
    constants: dict[str, FittedConstant]


@cache
def fitted_constants(package: str) -> dict[str, FittedConstant]:
    """Return the fitted constants of a package, by name."""
    return read_document(files(package) / FILE, _File, "file of fitted constants").constants


def fitted_value(package: str, name: str) -> float:
    """Return a fitted constant of a package."""
    return fitted_constants(package)[name].value
