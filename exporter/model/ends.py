"""The special tokens of a model: where its texts begin and end, by all files that say so."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.foundation.config_files import shown
from exporter.model.json_file import read_json_object_if_there
from exporter.model.tokenizer_files import is_id

# The key of a GGUF file of ours: llama.cpp has three keys for tokens that end a text, and takes some texts for ends.
GGUF_KEY = "edge_exporter.end_tokens"
ID = re.compile("[0-9]{1,9}")
FILES = ("config.json", "generation_config.json")
# -1 and null stand for none, in files of many models.
NONE = (None, -1)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens, each of them a row of the embedding.

    Attributes:
        roles: Role -> id; where the tokenizer names none, what the model's configuration names.
        ends: All ids at which a text ends, the tokenizer's first.
        notes: Sentences on ids that cannot be.
    """

    roles: dict[str, int]
    ends: tuple[int, ...]
    notes: tuple[str, ...]


def ends_written(ends: Iterable[int]) -> str:
    """Return ids of end tokens as a GGUF file has them: as text, since llama.cpp hands out no lists."""
    return ",".join(map(str, ends)) or "none"


def ends_read(text: str) -> list[int]:
    """Return the ids of end tokens that a text of a GGUF file states."""
    return list(map(int, ID.findall(text)))


def special_ids(folder: Path, named: Mapping[str, int], rows: int) -> SpecialIds:
    """Return the ids of special tokens that the tokenizer, config.json and generation_config.json name.

    A text ends at each token that any of them calls its end, as transformers ends it where these files agree.

    Args:
        folder: Holds the two files.
        named: Role -> id, as the tokenizer names them.
        rows: Rows of the embedding.

    Raises:
        InputError: one of the files is no JSON object.
    """
    settings = {name: read_json_object_if_there(folder / name) or {} for name in FILES}
    roles, ends = dict(named), [named["eos"]] if "eos" in named else []
    notes: list[str] = []
    for name, content in settings.items():
        for role in ("bos", "pad", "eos"):
            listed = list(_listed(content.get(f"{role}_token_id")))
            usable = [number for number in listed if is_id(number, rows)]
            if role == "eos":
                ends += usable
            notes += _impossible(listed, rows, f"{role}_token_id of {name}")
            if usable:
                roles.setdefault(role, usable[0])
    return SpecialIds(roles, tuple(dict.fromkeys(ends)), tuple(notes))


def _listed(value: object) -> Iterator[Any]:
    yield from (one for one in (value if isinstance(value, list) else [value]) if one not in NONE)


def _impossible(listed: Iterable[Any], rows: int, where: str) -> Iterator[str]:
    wrong = [shown(number) for number in listed if not is_id(number, rows)]
    if wrong:
        yield f"{where} names no token of the model and is left out: {', '.join(wrong[:8])}"
