"""The files beside a model that state the terms it is under."""

from pathlib import Path

PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# The longest licences of published models have about 100 kB.
MAX_BYTES = 1 << 20


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that state terms, in order of their names; larger files are no such texts."""
    found = {path for pattern in PATTERNS for path in folder.glob(pattern)}
    return tuple(sorted(path for path in found if path.is_file() and path.stat().st_size <= MAX_BYTES))
