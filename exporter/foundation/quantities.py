"""Strict documents, numbers with their basis, and checks against limits."""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from exporter.foundation.errors import InputError

Basis = Literal["measured", "emulated", "estimated", "published"]
Status = Literal["passed", "failed", "not run"]


class Document(BaseModel):
    """Base class of all documents in files: strict, frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


D = TypeVar("D", bound=Document)
MOST_SHOWN = 200
# The report of a model with 126 layers has 15,000 commas.
MOST_COMMAS = 1 << 16
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Larger than any real count of bytes or items, and representable in every program.
Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]


def from_json(kind: type[D], text: str | bytes, where: object) -> D:
    """Parse a document of the given kind from untrusted text.

    Raises:
        InputError: the text is not JSON, has too many values, or does not match the schema.
    """
    # Each value takes a hundred bytes in memory, and errors quote them.
    commas = text.count(",") if isinstance(text, str) else text.count(b",")
    if commas > MOST_COMMAS:
        raise InputError(
            f"not a {kind.__name__} document: it has too many values", where=where, got=f"{commas:,} commas",
            expected=f"at most {MOST_COMMAS:,}",
        )  # fmt: skip
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])[:MOST_SHOWN]
        raise InputError(
            f"not a {kind.__name__} document: {key or 'the text'}: {first['msg']}",
            where=where,
            next_step="get the bundle again, or use the version of edge-exporter that made it",
        ) from error


class Quantity(Document):
    """A number with its unit and its basis (measured on this host, emulated, estimated, published)."""

    value: float
    unit: str
    basis: Basis


class Pruning(Document):
    """Feed-forward channels removed before formats were assigned to matrices.

    Attributes:
        method: The method that selected them.
        removed: Removed share of the channels, a `fraction`.
        widths: Channels kept in each layer.
        carried: How the files store these widths.
        zero_bytes: `bytes` of zero channels in the files, if layers are padded to the widest.
    """

    method: str
    removed: Quantity
    widths: tuple[int, ...]
    carried: str
    zero_bytes: Quantity


class Check(Document):
    """The outcome of one check; a check that was not run never counts as passed.

    `value` and `limit` are in `unit` if the check compares two numbers.
    """

    name: str
    status: Status
    detail: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
