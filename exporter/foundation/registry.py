"""Maps names to plug-in files: a method or a device is one file, a target one folder, named after the plug-in.

Listing does not import; loading imports the one module named.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from exporter.foundation.errors import MissingDependencyError, RequestError, did_you_mean


def names(package: str, suffix: str = ".py") -> list[str]:
    """Return the sorted names of a package's plug-in files without importing them."""
    entries = _entries(package)
    return sorted(_name(entry, suffix) for entry in entries if entry.name.endswith(suffix) and entry.name[0] != "_")


def folders(package: str, entry: str) -> list[str]:
    """Return the sorted names of a package's folders that contain the file `entry`."""
    return sorted(_name(found, "") for found in _entries(package) if found.joinpath(entry).is_file())


def file_of(package: str, name: str) -> Path:
    """Return a file of a package that `names` found."""
    return next(entry for entry in _entries(package) if entry.name == name)


def _entries(package: str) -> Iterator[Path]:
    """Yield what is in the folders of a package; there are several if somebody extended its `__path__`."""
    for folder in importlib.import_module(package).__path__:
        yield from Path(folder).iterdir()


def load(module: str, name: str, known: list[str], kind: str) -> ModuleType:
    """Import the plug-in called `name` from the module pattern `module`, such as `exporter.compress.{}`.

    Raises:
        RequestError: there is no such plug-in.
        MissingDependencyError: the plug-in needs a library that is not installed.
    """
    if name not in known:
        raise RequestError(f"unknown {kind} {name!r}", next_step=did_you_mean(name, known))
    try:
        return importlib.import_module(module.format(name.replace("-", "_")))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("exporter"):
            raise
        raise MissingDependencyError(
            f"{kind} {name!r} needs the library {error.name!r}, which is not installed",
            next_step=f"install it: pip install {error.name.split('.')[0].replace('_', '-')}",
        ) from error


def _name(entry: Path, suffix: str) -> str:
    return entry.name.removesuffix(suffix).replace("_", "-")
