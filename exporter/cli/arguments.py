"""Arguments that several commands share, and how a command ends when a check failed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exporter.foundation.errors import CheckError, InputError, RequestError

if TYPE_CHECKING:
    from exporter.foundation.quantities import Check


def _memory(text: str) -> int:
    """Return the bytes of a memory size."""
    from exporter.device.memory_size import ram_bytes

    return ram_bytes(text)


BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder of the bundle.")]
DeviceOption = Annotated[str, typer.Option("--device", "-d", help="Device name, or path of a TOML profile.")]
RamOption = Annotated[
    int | None,
    typer.Option("--ram", parser=_memory, help="Memory of the device, such as 8GB: one of the sizes it is sold with."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
NoCheckOption = Annotated[
    bool, typer.Option("--no-check", help="Load the model's files without comparing them with the manifest.")
]


def require_bundle(path: Path) -> None:
    """Raise if a path is not a bundle: another folder is a wrong request, one that lost its manifest a bad bundle."""
    if not os.path.lexists(path / "manifest.json"):
        kind = InputError if os.path.lexists(path / "selftest.json") else RequestError
        raise kind("this is no bundle", where=path, expected="a folder with manifest.json")


def fail_on(checks: "Sequence[Check]") -> None:
    """Raise if a check failed; one that was not run did not fail."""
    failed = [check.name for check in checks if check.status == "failed"]
    if failed:
        raise CheckError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
