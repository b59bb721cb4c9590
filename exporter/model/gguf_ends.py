"""The tokens that end a text as this exporter states them in GGUF files.

llama.cpp has only three keys for such tokens, and infers others from their text.
"""

import re
from collections.abc import Iterable

KEY = "edge_exporter.end_tokens"
ID = re.compile("[0-9]{1,9}")


def ends_written(ends: Iterable[int]) -> str:
    """Return ids of end tokens as text, since llama.cpp does not return lists."""
    return ",".join(map(str, ends)) or "none"


def ends_read(text: str) -> list[int]:
    """Return the ids of end tokens from the text in a file."""
    return list(map(int, ID.findall(text)))
