"""Numbers that say how they are known, and checks against limits."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Basis = Literal["measured", "emulated", "estimated", "published"]
Status = Literal["passed", "failed", "not run"]


class Document(BaseModel):
    """Base of all that is written to or read from a file: strict, frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantity(Document):
    """A number with its unit and its basis (measured on this host, emulated, estimated, published)."""

    value: float
    unit: str
    basis: Basis


class Pruning(Document):
    """Feed-forward channels that were taken away before matrices got their formats.

    Attributes:
        method: What chose them.
        removed: Share of them that went, a `fraction`.
        widths: How many each layer keeps.
        carried: How the files hold these widths.
        zero_bytes: `bytes` of the files that hold channels of zeros, where layers are filled up to the widest.
    """

    method: str
    removed: Quantity
    widths: tuple[int, ...]
    carried: str
    zero_bytes: Quantity


class Check(Document):
    """The outcome of one check; a check that was not run is never a pass.

    `value` and `limit` share the unit `unit` where the check compares two numbers.
    """

    name: str
    status: Status
    detail: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
