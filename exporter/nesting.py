"""How deep a document nests, which what reads it later may not survive."""

from typing import Any


def deeper_than(most: int, value: dict[Any, Any] | list[Any]) -> bool:
    """Return whether lists and dictionaries lie in one another at more than so many levels."""
    level: list[Any] = [value]
    for _ in range(most):
        level = [item for parent in level for item in _items(parent) if isinstance(item, dict | list)]
    return bool(level)


def _items(parent: dict[Any, Any] | list[Any]) -> Any:
    return parent.values() if isinstance(parent, dict) else parent
