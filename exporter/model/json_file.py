"""Reads untrusted JSON files of a model folder within limits."""

import json
from pathlib import Path
from typing import Any

from exporter.foundation.config_files import deeper_than
from exporter.foundation.errors import InputError

# A tokenizer.json of 262,144 tokens takes 33 MB and holds 2 million values.
MAX_BYTES = 48 << 20
MAX_VALUES = 1 << 22
# Files written by transformers and tokenizers nest fewer than 16 levels.
MAX_DEPTH = 64
NEXT_STEP = "mend the file, or fetch it again"


def read_json_object(path: Path, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; the last value of a duplicate key counts, as usual in Python.

    Args:
        path: The file.
        most_bytes: Maximum file size.

    Raises:
        InputError: the file is missing, too large, nested too deeply, not UTF-8, or not one JSON object.
    """
    text = _text(path, most_bytes)
    # An empty list takes 3 bytes in the file and 64 in memory.
    values = text.count(",") + text.count("[") + text.count("{")
    if values > MAX_VALUES:
        raise InputError(f"{path.name} holds too many values", where=path, got=values, expected=f"at most {MAX_VALUES}")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:
        raise InputError(f"{path.name} is not valid JSON", where=path, got=error, next_step=NEXT_STEP) from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f"{path.name} holds no JSON object", where=path, got=kind, expected="an object in braces")
    if deeper_than(MAX_DEPTH, value):
        raise _too_deep(path)
    if "\\ud" in text or "\\uD" in text:
        _require_unicode(value, path)
    return value


def read_json_object_if_there(path: Path, most_bytes: int = MAX_BYTES) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file does not exist.

    Raises:
        InputError: see `read_json_object`.
    """
    return read_json_object(path, most_bytes) if path.exists() else None


def _text(path: Path, most_bytes: int) -> str:
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path.name}", where=path)
        size = path.stat().st_size
        if size > most_bytes:
            raise InputError(
                f"{path.name} is too large", where=path, got=f"{size} bytes", expected=f"at most {most_bytes}"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.name} cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not valid UTF-8", where=path, got=error, next_step=NEXT_STEP) from error


def _too_deep(path: Path) -> InputError:
    return InputError(f"{path.name} is nested too deeply", where=path, expected=f"at most {MAX_DEPTH} levels")


def _require_unicode(value: dict[str, Any], path: Path) -> None:
    """Reject lone surrogates, which escapes can spell but UTF-8 cannot encode."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{path.name} holds half a surrogate pair", where=path, next_step=NEXT_STEP) from error
