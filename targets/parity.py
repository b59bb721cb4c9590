"""How close float32 artifacts of each family are to the model: figures of tiny random models, kept as data."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

from pydantic import Field

from exporter.device.provenance import Text
from exporter.foundation.config_files import read_document
from exporter.foundation.quantities import Basis, Document
from exporter.model.family import families
from exporter.targets.contract import load_target

FILE = "parity.toml"


class TargetParity(Document):
    """The figures of one target.

    Attributes:
        runtime: Packages and versions of the runtime.
        kl_mean: `model_type` -> mean KL divergence in nats of a float32 artifact's next-token distributions from those
            of transformers in float32.
    """

    runtime: Text
    kl_mean: dict[str, Annotated[float, Field(ge=0)]]


class Parity(Document):
    """The file `parity.toml`.

    Attributes:
        basis: How the figures are known.
        on: What they were measured on.
        command: The command that measures them and writes the file.
        date: When they were.
        targets: Name -> figures of a target.
    """

    schema_version: Literal[1]
    basis: Basis
    on: Text
    command: Text
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    targets: dict[str, TargetParity]


@cache
def parity() -> Parity:
    """Return the content of the file."""
    return read_document(files("exporter.targets") / FILE, Parity, "file of parity figures")


@dataclass(frozen=True)
class BuiltBy:
    """What a target does with a family.

    Attributes:
        target: Name of the target.
        lacks: Why it builds no model of the family; None if it does.
        kl: Mean KL divergence of a float32 artifact, in nats; None if it was not measured.
        limited_by: What limits the context of this target besides what limits that of all.
    """

    target: str
    lacks: str | None
    kl: float | None
    limited_by: str | None


@dataclass(frozen=True)
class FamilyRow:
    """A family as users know it.

    Attributes:
        model_type: `model_type` in config.json.
        multimodal_type: `model_type` of models with an encoder of images, of which the decoder is built; None for none.
        title: Names of its models.
        architecture: Class name in config.json's `architectures`.
        context: The longest text that artifacts compute as the model does.
        targets: What each target does with it.
    """

    model_type: str
    multimodal_type: str | None
    title: str
    architecture: str
    context: str
    targets: tuple[BuiltBy, ...]

    @property
    def contexts(self) -> str:
        """The usable context in words, that of single targets too."""
        named: dict[str, list[str]] = {}
        for one in self.targets:
            if one.limited_by:
                named.setdefault(one.limited_by, []).append(one.target)
        return "; ".join([self.context, *(f"{', '.join(names)}: at most {limit}" for limit, names in named.items())])

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of `model_type` that its models have."""
        return (self.model_type,) if self.multimodal_type is None else (self.model_type, self.multimodal_type)


def family_rows(targets: list[str]) -> list[FamilyRow]:
    """Return every family with what some targets do with it, in alphabetical order of `model_type`."""
    made = {name: load_target(name) for name in targets}
    figures = {name: parity().targets[name].kl_mean for name in targets if name in parity().targets}
    return [
        FamilyRow(
            family.model_type,
            None if family.multimodal is None else family.multimodal.model_type,
            family.title,
            family.architecture,
            family.usable_context,
            tuple(
                BuiltBy(
                    name,
                    target.lacks(family),
                    figures.get(name, {}).get(family.model_type),
                    target.limits_context(family),
                )
                for name, target in made.items()
            ),
        )
        for family in sorted(families().values(), key=lambda one: one.model_type)
    ]
