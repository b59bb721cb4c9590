"""The special tokens of a model, collected from all files that name them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.foundation.config_files import shown
from exporter.model.json_file import read_json_object_if_there
from exporter.model.tokenizer_files import is_id

CONFIG = "config.json"
FILES = (CONFIG, "generation_config.json")
# Where a multimodal model's config.json has the keys of its decoder.
TEXT = "text_config"
# Many models use -1 and null for "none".
NONE = (None, -1)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of special tokens; each is a row of the embedding.

    Attributes:
        roles: Role -> id from the tokenizer, else from the model's configuration.
        ends: All ids that end a text, the tokenizer's first.
        notes: Sentences on impossible ids.
    """

    roles: dict[str, int]
    ends: tuple[int, ...]
    notes: tuple[str, ...]


def special_ids(folder: Path, named: Mapping[str, int], rows: int) -> SpecialIds:
    """Return the ids of special tokens named by the tokenizer, config.json or generation_config.json.

    A text ends at every token that any of them names as its end. This matches transformers if these files agree.

    Args:
        folder: Holds the two files.
        named: Role -> id from the tokenizer.
        rows: Rows of the embedding.

    Raises:
        InputError: one of the files is not a JSON object.
    """
    settings = {name: read_json_object_if_there(folder / name) or {} for name in FILES}
    inner = settings[CONFIG].get(TEXT)
    if isinstance(inner, dict):
        settings[f"{TEXT} in {CONFIG}"] = inner
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
