"""Reads documents from users' TOML files: bounded in size, strict, with errors of one sentence that name the key."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from reprlib import Repr
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.foundation.quantities import Document
from exporter.foundation.registry import file_of, names

# The longest bundled profile has 9 KB.
MAX_FILE_BYTES = 1 << 18
MAX_DEPTH = 16
# tomllib takes time quadratic in the parts of a dotted key. Texts in a line may contain dots, too.
MOST_DOTS = 256
MOST_LISTED = 20
IMPOSSIBLE = "impossible"
EXPECTED = {
    "bool_type": "true or false",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "model_type": "a table",
    "string_type": "text",
    "tuple_type": "a list",
}

Kind = TypeVar("Kind", bound=Document)


def impossible(what: str, got: object, expected: object, next_step: str | None = None) -> PydanticCustomError:
    """Return the error of a validator for a value of the right type that is impossible."""
    facts = {"what": what, "got": str(got), "expected": str(expected), "next_step": next_step}
    return PydanticCustomError(IMPOSSIBLE, "{what}", facts)


def named_file(name_or_path: str, package: str, what: str) -> Path | Traversable:
    """Return a package's TOML file by its name, or the user's own by its path.

    Args:
        name_or_path: A name, or a path: it ends with `.toml` or contains a separator.
        package: Package of the named files.
        what: Subject of such a file, such as `device`.

    Raises:
        RequestError: the package has no file of that name.
    """
    if name_or_path.endswith(".toml") or any(sign in name_or_path for sign in (os.sep, os.altsep) if sign):
        return Path(name_or_path)
    known = names(package, suffix=".toml")
    if name_or_path not in known:
        advice = did_you_mean(name_or_path, known, MOST_LISTED)
        raise RequestError(f"unknown {what} {shown(name_or_path)}", next_step=f"{advice}; or give a .toml file")
    return file_of(package, f"{name_or_path}.toml")


def read_document(file: Path | Traversable, kind: type[Kind], what: str) -> Kind:
    """Return the document in a TOML file.

    Args:
        file: The file.
        kind: Class of the document.
        what: Name of such a file, such as `device profile`.

    Raises:
        RequestError: there is no such file.
        InputError: it is too large, is not TOML, or is not a valid document.
    """
    return checked(read_toml(file, what), kind, file)


def read_toml(file: Path | Traversable, what: str) -> dict[str, Any]:
    """Return the unchecked tables of a TOML file; for arguments and errors see `read_document`."""
    data = _read_bounded(file, what)
    try:
        if any(line.count(b".") > MOST_DOTS for line in data.split(b"\n")):
            raise RecursionError(f"a line with more than {MOST_DOTS} dots")
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"the {what} is not TOML", where=file, got=error, expected="TOML in UTF-8") from error
    if deeper_than(MAX_DEPTH, table):
        raise InputError(f"the {what} is nested too deeply", where=file, expected=f"at most {MAX_DEPTH} levels")
    return table


def checked(table: Mapping[str, Any], kind: type[Kind], where: object) -> Kind:
    """Return a table as a document.

    Raises:
        InputError: it is not valid; the message names the first fault.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        raise _refusal(error, kind, where) from error


def shown(value: object) -> str:
    """Return a value from a file, shortened for a message."""
    return "a table" if isinstance(value, dict) else _Shortener().repr(value)


def deeper_than(most: int, value: dict[str, Any] | list[Any]) -> bool:
    """Return whether tables and lists are nested more than `most` levels deep."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [item for parent in level for item in _items(parent) if isinstance(item, dict | list)]
    return bool(level)


def _items(parent: dict[str, Any] | list[Any]) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


class _Shortener(Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        # Python cannot print numbers of more than 4,300 digits, which a file can hold in hexadecimal.
        return super().repr_int(x, level) if x.bit_length() < 1 << 12 else f"a number of {x.bit_length()} bits"


def _read_bounded(file: Path | Traversable, what: str) -> bytes:
    try:
        if not file.is_file():
            raise RequestError("there is no such file", where=file, next_step=f"give the path of a {what}")
        with file.open("rb") as opened:
            data: bytes = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"the {what} cannot be read", where=file, got=error.strerror) from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"the {what} is too large", where=file, expected=f"at most {MAX_FILE_BYTES} bytes")
    return data


def _refusal(error: ValidationError, kind: type[Document], file: object) -> InputError:
    """Return the first fault as one sentence; a misspelt key comes before the resulting missing key."""
    fault = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    location, name = fault["loc"], fault["type"]
    if name == "extra_forbidden":
        *parents, key = location
        advice = did_you_mean(str(key), _known_keys(kind, parents))
        return InputError(f"unknown key {shown(key)}", where=_at(file, parents), next_step=advice)
    where = _at(file, location)
    if name == "missing":
        return InputError("the key is missing", where=where, next_step="add it")
    if name == IMPOSSIBLE:
        return InputError(where=where, **fault["ctx"])
    return InputError("the value is wrong", where=where, got=shown(fault["input"]), expected=_expected(fault))


def _expected(fault: ErrorDetails) -> str:
    return EXPECTED.get(fault["type"], fault["msg"].removeprefix("Input should be "))


def _at(file: object, location: Sequence[int | str]) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return ": ".join(filter(None, (str(file), "".join(steps).removeprefix("."))))


def _known_keys(kind: type[Document], location: Sequence[int | str]) -> list[str]:
    """Return the keys of the table at a location of the schema."""
    table: type[BaseModel] = kind
    for step in location:
        if isinstance(step, str):
            table = _tables(table.model_fields[step].annotation)[0]
    return list(table.model_fields)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation such as `tuple[Cluster, ...]` or `Fact | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for inner in get_args(annotation) for table in _tables(inner)]
