"""Checks of an untrusted artifact before a runtime loads it."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from exporter.foundation.errors import InputError
from exporter.targets.artifact import Artifact, part_of, target_names

# Returns the bytes of a file below the artifact's folder; refuses a file larger than the given number of bytes.
Read = Callable[[str, int], bytes]


class Intake(Protocol):
    """The checks of one target; its module `intake` exports them as `INTAKE`.

    Attributes:
        weights: Names of the model files, required ones first.
        required: How many of them are required.
    """

    weights: tuple[str, ...]
    required: int

    def admit(self, artifact: Artifact, names: Collection[str], read: Read, folder: Path) -> Artifact:
        """Return an artifact that is safe to load: files that control loading are checked and rewritten.

        Args:
            artifact: The artifact as received; its files are not changed.
            names: Paths of its files below its folder; a coded file has the name of its plain form.
            read: Reads one of them.
            folder: An empty folder for rewritten files and for links to files that hold only numbers and text.

        Raises:
            InputError: a file asks a runtime for something that no artifact of this exporter asks for.
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
    found: Intake = part_of(target, "intake").INTAKE
    return found
