"""What a target lets in of an artifact that somebody else may have made, before any runtime is given it."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from exporter.foundation.errors import InputError
from exporter.foundation.registry import load
from exporter.targets.artifact import Artifact, target_names

# Returns the bytes of a file below the artifact's folder, refused where they are more than so many.
Read = Callable[[str, int], bytes]


class Intake(Protocol):
    """One target's rules; a target has them as `INTAKE` of its module `intake`.

    Attributes:
        weights: Names of the files that hold the model, those that it must have first.
        required: How many of them it must have.
    """

    weights: tuple[str, ...]
    required: int

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """Return an artifact that is safe to load: what says how to load it is checked, and written anew.

        Args:
            artifact: As it came; its files are not changed.
            names: Paths below its folder of the files that it has, those of coded ones as they are plain.
            read: Reads one of them.
            folder: An empty folder for what is written anew, and for links to what holds numbers and text alone.

        Raises:
            InputError: a file asks a runtime for something that no artifact of ours does.
        """


def intake_of(target: str) -> Intake:
    """Return the rules of a target that a bundle names.

    Raises:
        InputError: there is no such target.
    """
    known = target_names()
    if target not in known:
        raise InputError(
            "the bundle is for a target that is not known here", got=repr(target), expected=" or ".join(known),
            next_step="use the version of edge-exporter that made it",
        )  # fmt: skip
    found: Intake = load("exporter.targets.{}.intake", target, known, "target").INTAKE
    return found
