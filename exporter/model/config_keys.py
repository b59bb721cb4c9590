"""Selects the keys of config.json that change what a model computes, using the table in `config_keys.toml`."""

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.attention_windows import SLIDING
from exporter.model.family import Family, Multimodal
from exporter.model.limits import MAX_LAYERS, MAX_POSITIONS, MAX_WIDTH

# Keys of a multimodal config.json that hold for its decoder, too.
OF_THE_WHOLE = (
    "architectures", "model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
MAX_NAMES = 2 * MAX_LAYERS
MAX_FLOAT32 = float(np.finfo(np.float32).max)
ROPE_TABLES = ("rope_scaling", "rope_parameters")
PARTIAL = "partial_rotary_factor"
HARMLESS: tuple[object, ...] = (None, False, 0, "", [], {})
REMOVE = "remove it from config.json if it changes nothing that the model computes"


@cache
def key_table() -> dict[str, Any]:
    """Return the table."""
    return tomllib.loads((files("exporter.model") / "config_keys.toml").read_text(encoding="utf-8"))


def honoured(raw: Mapping[str, Any], family: Family, where: object) -> dict[str, Any]:
    """Return the keys of a config.json that change what the model computes; all others must be harmless.

    Args:
        raw: The content of the file.
        family: Its family.
        where: The file, for messages.

    Raises:
        InputError: an unknown key may change the function, or a value is impossible.
    """
    table = key_table()
    known, only = table["honoured"] | family.honoured, table["only"] | family.only
    for key, value in raw.items():
        if key in known:
            _require_kind(key, value, known[key], where)
        elif key in table["inert"]["kinds"]:
            _require_kind(key, value, table["inert"]["kinds"][key], where)
        elif not _is_inert(key, (*table["inert"]["names"], *table["inert"]["patterns"], *family.inert)):
            _require_harmless(key, value, only, where)
    for name, parameters in _rope_tables(raw, family):
        _check_rope(name, parameters, table["rope"], family, where)
    return {key: value for key, value in raw.items() if key in known}


def foreign_keys(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Return the keys of a config.json that a family does not know, and whose values may change what is computed."""
    table = key_table()
    known = {*table["honoured"], *family.honoured, *table["inert"]["kinds"]}
    inert = (*table["inert"]["names"], *table["inert"]["patterns"], *family.inert)
    others = (key for key in raw if key not in known and not _is_inert(key, inert))
    return sorted(key for key in others if not _is_harmless(key, raw[key], table["only"] | family.only))


def check_multimodal(raw: Mapping[str, Any], form: Multimodal, where: object) -> None:
    """Check the keys of the config.json of a multimodal model beside its decoder's own: they must be harmless.

    Raises:
        InputError: an unknown key may change the function, or a value is impossible.
    """
    table = key_table()
    known = {key: table["honoured"][key] for key in OF_THE_WHOLE} | {form.text_key: "table"}
    inert = (*table["inert"]["names"], *table["inert"]["patterns"], *form.inert)
    for key, kind in known.items():
        if key in raw or key == form.text_key:
            _require_kind(key, raw.get(key), kind, where)
    for key, value in raw.items():
        if key not in known and not _is_inert(key, inert):
            _require_harmless(key, value, {}, where)


def _is_inert(key: str, inert: Iterable[str]) -> bool:
    # Names that start with two underscores belong to Python.
    return key[:2] != "__" and any(fnmatchcase(key, pattern) for pattern in inert)


def _is_harmless(key: str, value: object, only: Mapping[str, object]) -> bool:
    harmless = (None, only[key]) if key in only else HARMLESS
    return not key.startswith("__") and any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
    )


def _require_harmless(key: str, value: object, only: Mapping[str, object], where: object, at: str = "") -> None:
    if _is_harmless(key, value, only):
        return
    raise InputError(
        f"config.json sets {shown(key)}{at}, which no target carries",
        where=where,
        got=shown(value),
        expected=shown(only[key]) if key in only else "no such key",
        next_step=REMOVE,
    )


def _rope_tables(raw: Mapping[str, Any], family: Family) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the parameters of rotary embeddings with their names, of each kind of attention if there are several."""
    for name in ROPE_TABLES:
        given = raw.get(name) or {}
        by_kind = {kind: given.get(kind) for kind in family.rotary_kinds}
        if len(by_kind) > 1 and given.keys() <= by_kind.keys():
            yield from ((f"{name}.{kind}", own) for kind, own in by_kind.items() if isinstance(own, dict))
        elif given:
            yield name, given


def _check_rope(
    name: str, parameters: Mapping[str, Any], kinds: Mapping[str, Any], family: Family, where: object
) -> None:
    """Reject unsupported kinds of rotary embedding, and unsupported parameters that change the function."""
    if name.endswith(f".{SLIDING}"):
        # Both runtimes have a second base, and no scaling of it.
        kinds = {"default": kinds["default"]}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    kind = family.rotary_names.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(
            f"rotary embeddings of type {shown(kind)} are not supported", where=where, got=f"{name} in config.json",
            expected="one of " + ", ".join(kinds), next_step="no target computes them yet",
        )  # fmt: skip
    known = kinds[kind]["honoured"] | {"rope_theta": "positive?"}
    known |= {key: value for key, value in family.honoured.items() if key == PARTIAL} | dict(family.rotary_honoured)
    for key, needed in family.rotary_honoured.items():
        _require_kind(key, parameters.get(key), needed, where)
    named = parameters.get("rope_type", parameters.get("type", kind))
    only = {"rope_type": named, "type": named, "partial_rotary_factor": 1.0, "factor": 1.0, "attention_factor": 1.0}
    for key, value in parameters.items():
        if key in known:
            _require_kind(key, value, known[key], where)
        elif key not in kinds[kind]["inert"]:
            _require_harmless(key, value, only, where, f" in {name}")


def _require_kind(key: str, value: object, kind: str, where: object) -> None:
    if kind.endswith("?") and value is None:
        return
    fits, expected = KINDS[kind.removesuffix("?")]
    if not fits(value):
        raise InputError(f"config.json has no usable {shown(key)}", where=where, got=shown(value), expected=expected)


def _whole(least: int, most: int) -> tuple[Callable[[object], bool], str]:
    def fits(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return fits, f"a whole number from {least} to {most}"


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= MAX_FLOAT32  # type: ignore[operator]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100


def _is_names(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(map(_is_name, value))


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_WIDTH and all(map(_is_positive, value))


def _is_widths_of_heads(value: object) -> bool:
    fits, _ = KINDS["width"]
    return isinstance(value, dict) and all(
        isinstance(own, dict) and own.keys() == {"head_dim"} and fits(own["head_dim"]) for own in value.values()
    )


def _is_layer_numbers(value: object) -> bool:
    fits, _ = KINDS["whole"]
    return isinstance(value, list) and len(value) <= MAX_LAYERS and all(map(fits, value))


def _is_activation(value: object) -> bool:
    return isinstance(value, str) and value in key_table()["activations"]


def _is_ids(value: object) -> bool:
    fits, _ = KINDS["id"]
    return all(map(fits, value)) and len(value) <= MAX_NAMES if isinstance(value, list) else fits(value)


KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "absent": (lambda value: False, "no such key"),
    "activation": (_is_activation, "an activation that a target computes"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "id": _whole(-MAX_POSITIONS, MAX_POSITIONS),
    "ids": (_is_ids, "a token id or a list of them"),
    "layer numbers": (_is_layer_numbers, "a list of numbers of layers"),
    "layers": _whole(1, MAX_LAYERS),
    "name": (_is_name, "a name"),
    "names": (_is_names, "a list of names"),
    "numbers": (_is_numbers, "a list of positive numbers"),
    "positions": _whole(1, MAX_POSITIONS),
    "positive": (_is_positive, "a positive number"),
    "share": (lambda value: _is_positive(value) and value <= 1, "a number above 0, up to 1"),  # type: ignore[operator]
    "table": (lambda value: isinstance(value, dict), "an object"),
    "whole": _whole(0, MAX_POSITIONS),
    "width": _whole(1, MAX_WIDTH),
    "widths of heads": (_is_widths_of_heads, "an object that gives layers a head_dim and nothing else"),
}
