"""Writes device profiles made from measurements as TOML files."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from exporter.device.profile import DeviceProfile


def profile_toml(profile: DeviceProfile) -> str:
    """Return TOML text that `load_device` reads back as an equal profile."""
    return "\n".join(_lines(profile.model_dump(mode="json", exclude_none=True))) + "\n"


def _lines(table: Mapping[str, Any], parents: str = "") -> Iterator[str]:
    """Yield a table's own values, then its inner tables, as TOML requires."""
    inner = [key for key, value in table.items() if _is_table_list(value)]
    tables = [key for key, value in table.items() if _is_table_of_tables(value)]
    for key, value in table.items():
        if key not in inner and key not in tables:
            yield f"{key} = {_value(value)}"
    for key in tables:
        yield f"\n[{parents}{key}]"
        yield from _lines(table[key], f"{parents}{key}.")
    for key in inner:
        for entry in table[key]:
            yield f"\n[[{parents}{key}]]"
            yield from _lines(entry, f"{parents}{key}.")


def _is_table_list(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


def _is_table_of_tables(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, dict) for entry in value.values())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and value.is_integer():
        return f"{int(value):_}"
    # JSON strings and booleans are valid TOML for any text that a profile may hold.
    return json.dumps(value, ensure_ascii=False)
