"""Reads config.json of a model folder: checks each key, then loads it with transformers without running model code."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.config_keys import check_multimodal, honoured
from exporter.model.family import Family, Multimodal, families
from exporter.model.json_file import read_json_object
from exporter.model.recognised import no_config, refuse_quantised
from exporter.model.relatives import nearest
from exporter.model.rotary import check_rotary

TensorNames = Callable[[], Collection[str]]
CONFIG = "config.json"
# A config.json that names 20,000 classes takes about 1 MB.
MAX_CONFIG_BYTES = 16 << 20
FLOAT, NOT_IN_JSON = "__float__", ("Infinity", "-Infinity", "NaN")


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


def checked_config(raw: dict[str, Any], where: object, tensors: TensorNames = tuple) -> PretrainedConfig:
    """Return the transformers config for the content of config.json; for errors see `load_config`.

    Args:
        raw: The content.
        where: The file, for messages.
        tensors: Returns the names of the model's tensors, from which an error tells the nearest family.
    """
    # Most models with code of their own are of no known family: name the code first.
    if "auto_map" in raw and not _is_adopted(raw["auto_map"], raw.get("model_type")):
        raise InputError(
            "the model asks to run code of its own (auto_map), which is refused",
            where=where,
            next_step="use a model of an architecture that transformers has built in",
        )
    raw = {key: value for key, value in raw.items() if key != "auto_map"}
    form = multimodal_form(raw)
    if form is not None:
        return _text_config(raw, form, where)
    family = _family(raw, where, tensors)
    keys = deepcopy(honoured(raw, family, where)) | {"architectures": [family.architecture]}
    with _read_by_transformers(where):
        config: PretrainedConfig = CONFIG_MAPPING[family.model_type].from_dict(keys)
        config.standardize_rope_params()
        family.normalise(config)
        # Tokenizers also read the file, so transformers must accept it with all its keys.
        CONFIG_MAPPING[family.model_type].from_dict(_as_read_by_transformers(raw))
    check_rotary(config, where)
    return config


def multimodal_form(raw: Mapping[str, Any]) -> Multimodal | None:
    """Return the multimodal form of a family that config.json names; None for a decoder alone, or if it is unusable."""
    forms = [family.multimodal for family in families().values() if family.multimodal is not None]
    named = _first(raw.get("architectures"))
    return next(
        (form for form in forms if raw.get("model_type") == form.model_type and named in (None, form.architecture)),
        None,
    )


def _text_config(raw: dict[str, Any], form: Multimodal, where: object) -> PretrainedConfig:
    """Return the config of the decoder in a multimodal model."""
    check_multimodal(raw, form, where)
    with _read_by_transformers(where):
        whole: PretrainedConfig = CONFIG_MAPPING[form.model_type].from_dict(_as_read_by_transformers(raw))
    text, place = raw[form.text_key], f"{where}: {form.text_key}"
    refuse_quantised(text, place)
    kinds = [
        family.model_type
        for family in families().values()
        if family.multimodal is not None and family.multimodal.model_type == form.model_type
    ]
    if text.get("model_type") not in kinds:
        raise InputError(
            f"the decoder of this {form.architecture} is of a kind that is not supported", where=place,
            got=shown(text.get("model_type")), expected=f"the model_type {' or '.join(kinds)}",
        )  # fmt: skip
    # transformers ties head and embedding as the whole says, whatever its parts say.
    return checked_config(text | {"tie_word_embeddings": whole.tie_word_embeddings}, place)


@contextmanager
def _read_by_transformers(where: object) -> Iterator[None]:
    """Turn what transformers raises on a config into an `InputError`: it validates, and raises many exceptions."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), repr(error))
        raise InputError("transformers cannot read the config", where=where, got=reason[:300]) from error


def _as_read_by_transformers(value: Any) -> Any:
    """Return a copy of JSON with the numbers that transformers writes as objects, such as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_as_read_by_transformers(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {FLOAT} and value[FLOAT] in NOT_IN_JSON:
        return float(value[FLOAT])
    return {key: _as_read_by_transformers(one) for key, one in value.items()}


def _is_adopted(auto_map: object, model_type: object) -> bool:
    """Return whether all code that `auto_map` names is built into transformers by now; it may name a repository."""
    known = [name for family in families().values() if family.model_type == model_type for name in family.adopted_code]
    return isinstance(auto_map, dict) and all(
        isinstance(name, str) and name.rpartition("--")[2] in known for name in auto_map.values()
    )


def code_notes(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note on code that a folder of a known family brings along, which is never run."""
    if "auto_map" not in raw:
        return ()
    return ("the folder brings code of its own (auto_map), which is not run: transformers has this family built in",)


def _family(raw: dict[str, Any], where: object, tensors: TensorNames) -> Family:
    """Return the family that transformers loads for `model_type`; `architectures` may name it or its base model."""
    by_type = {family.model_type: family for family in families().values()}
    kind, named = raw.get("model_type"), _first(raw.get("architectures"))
    if named is not None and named not in {name for family in by_type.values() for name in _names_of(family)}:
        supported = "one of " + ", ".join(families())
        raise InputError(
            f"the architecture {shown(named)} is not supported", where=where, expected=supported,
            next_step=nearest(raw, tensors()).told,
        )  # fmt: skip
    if not isinstance(kind, str) or kind not in by_type:
        known = "one of " + ", ".join(by_type)
        raise InputError(
            "config.json has no usable 'model_type'", where=where, got=shown(kind), expected=known,
            next_step=nearest(raw, tensors()).told,
        )  # fmt: skip
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
