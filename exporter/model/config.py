"""Reads config.json of a model folder: checks each key, then loads it with transformers without running model code."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.config_keys import honoured
from exporter.model.family import Family, families
from exporter.model.json_file import read_json_object
from exporter.model.recognised import no_config
from exporter.model.rotary import check_rotary

CONFIG = "config.json"
# A config.json that names 20,000 classes takes about 1 MB.
MAX_CONFIG_BYTES = 16 << 20


def read_config(folder: Path) -> dict[str, Any]:
    """Return the unchecked content of config.json.

    Raises:
        InputError: it is missing or is not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise no_config(folder)
    return read_json_object(path, MAX_CONFIG_BYTES)


def load_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of a folder with only the keys that change what the model computes.

    Raises:
        InputError: config.json is missing or broken, asks for remote code, names an unsupported architecture, or sets
            something that no target supports.
    """
    return checked_config(read_config(folder), folder / CONFIG)


def checked_config(raw: dict[str, Any], where: object) -> PretrainedConfig:
    """Return the transformers config for the content of config.json; for errors see `load_config`."""
    # Most models with code of their own are of no known family: name the code first.
    if "auto_map" in raw and not _is_adopted(raw["auto_map"]):
        raise InputError(
            "the model asks to run code of its own (auto_map), which is refused",
            where=where,
            next_step="use a model of an architecture that transformers has built in",
        )
    raw = {key: value for key, value in raw.items() if key != "auto_map"}
    family = _family(raw, where)
    keys = deepcopy(honoured(raw, family, where)) | {"architectures": [family.architecture]}
    try:
        config: PretrainedConfig = CONFIG_MAPPING[family.model_type].from_dict(keys)
        config.standardize_rope_params()
        family.normalise(config)
        # Tokenizers also read the file, so transformers must accept it with all its keys.
        CONFIG_MAPPING[family.model_type].from_dict(deepcopy(raw))
    except Exception as error:
        # transformers validates the config and raises many kinds of exceptions.
        reason = next(iter(str(error).splitlines()), repr(error))
        raise InputError("transformers cannot read the config", where=where, got=reason[:300]) from error
    check_rotary(config, where)
    return config


def _is_adopted(auto_map: object) -> bool:
    """Return whether all code that `auto_map` names is built into transformers by now; it may name a repository."""
    known = {name for family in families().values() for name in family.adopted_code}
    return isinstance(auto_map, dict) and all(
        isinstance(name, str) and name.rpartition("--")[2] in known for name in auto_map.values()
    )


def code_notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on code that a folder of a known family brings along, which is never run."""
    if "auto_map" not in raw:
        return ()
    return ("the folder brings code of its own (auto_map), which is not run: transformers has this family built in",)


def _family(raw: dict[str, Any], where: object) -> Family:
    """Return the family that transformers loads for `model_type`; `architectures` may name it or its base model."""
    by_type = {family.model_type: family for family in families().values()}
    kind, named = raw.get("model_type"), _first(raw.get("architectures"))
    if named is not None and named not in {name for family in by_type.values() for name in _names_of(family)}:
        supported = "one of " + ", ".join(families())
        raise InputError(f"the architecture {shown(named)} is not supported", where=where, expected=supported)
    if not isinstance(kind, str) or kind not in by_type:
        known = "one of " + ", ".join(by_type)
        raise InputError("config.json has no usable 'model_type'", where=where, got=shown(kind), expected=known)
    if named is not None and named not in _names_of(by_type[kind]):
        raise InputError(
            f"config.json names the architecture {shown(named)} and the model_type {shown(kind)}",
            where=where,
            expected="both of one family",
            next_step="take both from the model's original config.json",
        )
    return by_type[kind]


def _first(names: object) -> str | None:
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return None


def _names_of(family: Family) -> tuple[str, str]:
    return family.architecture, family.base_model
