"""Which of a target's formats the backends of devices compute as they are: the file `backends.toml` of its folder.

A runtime on a GPU or a neural processor computes some formats as the file holds them. It rounds others again when it
loads them, and leaves the rest to the CPU. The CPU computes all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Annotated, Literal

from pydantic import Field

from exporter.device.backend import BackendName
from exporter.device.provenance import Text
from exporter.formats.group import Decision
from exporter.foundation.config_files import read_document
from exporter.foundation.errors import RequestError
from exporter.foundation.quantities import Check, Document
from exporter.model.model import Model
from exporter.targets.contract import Target

FILE = "backends.toml"
CPU: BackendName = "cpu"


class Computed(Document):
    """What a backend makes of a target's formats.

    Attributes:
        name: The backend.
        runtime: What computes there, with its version.
        computes: Formats that it computes as the file holds them.
        rounds: Formats that it rounds again when it loads them -> what they become.
        source: Where that is stated.
    """

    name: BackendName
    runtime: Text
    computes: Annotated[tuple[Text, ...], Field(strict=False)]
    rounds: Mapping[str, Text] = Field(default_factory=dict)
    source: Text


class ComputedFile(Document):
    """All that is known for a target."""

    schema_version: Literal[1]
    backends: Annotated[tuple[Computed, ...], Field(strict=False)]


@dataclass(frozen=True)
class BackendFormats:
    """The formats that may be chosen for a backend.

    Attributes:
        name: The backend.
        known: What it makes of them; None for the CPU, which computes all.
    """

    name: BackendName
    known: Computed | None

    def computes(self, format: str) -> bool:
        """Return whether the backend computes a format as the file holds it."""
        return self.known is None or format in self.known.computes

    def lacking(self, decisions: Iterable[Decision]) -> list[str]:
        """Return the names of formats, those of factors too, that the backend does not compute as they are."""
        used = chain.from_iterable(
            (one.format.name, *([] if one.low_rank is None else [one.low_rank.format.name])) for one in decisions
        )
        return sorted({name for name in used if not self.computes(name)})

    def require(self, decisions: Sequence[Decision], target: Target, model: Model) -> None:
        """Refuse decisions for formats that the backend does not compute as they are.

        Raises:
            RequestError: there are some; the type nearest in bytes that it does compute is named.
        """
        lacking = self.lacking(decisions)
        if not lacking:
            return
        assert self.known is not None
        fate = ", ".join(f"{name} ({self.known.rounds.get(name, 'left to the CPU')})" for name in lacking)
        if not self.known.computes:
            raise RequestError(
                f"{self.name} computes no format of the target {target.name} as the file holds it", got=fate,
                where=self.known.runtime, next_step="choose another backend or another target",
            )  # fmt: skip
        near = self._nearest(sum(one.stored_bytes for one in decisions), target, model)
        advice = "" if near is None else f"--type {near}, or "
        raise RequestError(
            f"{self.name} does not compute these formats as they are", got=fate,
            expected=f"only {', '.join(self.known.computes)} ({self.known.runtime})",
            next_step=f"take {advice}a limit such as --max-file-bytes, which chooses among those",
        )  # fmt: skip

    def _nearest(self, stored: int, target: Target, model: Model) -> str | None:
        """Return the type whose matrices the backend computes as they are, and whose bytes are nearest."""
        sizes = {}
        for type in target.types():
            try:
                decisions = target.decide(model, type, target.default_method)
            except RequestError:
                continue
            if not self.lacking(decisions):
                sizes[type] = abs(sum(one.stored_bytes for one in decisions) - stored)
        return min(sizes, key=lambda type: (sizes[type], type), default=None)

    def check(self, decisions: Sequence[Decision]) -> tuple[Check, ...]:
        """Return the check that the backend computes every matrix as the file holds it; none for the CPU."""
        if self.known is None:
            return ()
        names = ", ".join(sorted({one.format.name for one in decisions}))
        detail = f"{len(decisions)} matrices in formats that {self.known.runtime} computes as they are: {names}"
        return (Check(name="device.backend", status="passed", detail=f"{detail} ({self.known.source})"),)


def formats_on(backend: BackendName, target: str) -> BackendFormats:
    """Return the formats of a target that may be chosen for a backend.

    Raises:
        RequestError: it is not known what the backend computes of them.
    """
    if backend == CPU:
        return BackendFormats(CPU, None)
    path = files("exporter.targets") / target.replace("-", "_") / FILE
    known = read_document(path, ComputedFile, "file of a target's backends").backends if path.is_file() else ()
    found = next((one for one in known if one.name == backend), None)
    if found is None:
        names = ", ".join([CPU, *(one.name for one in known)])
        raise RequestError(
            f"it is not known what {backend} computes of the target {target}", where="--backend",
            next_step=f"known for it: {names}; or take another target",
        )  # fmt: skip
    return BackendFormats(backend, found)
