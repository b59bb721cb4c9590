"""Converts the header of a GGUF file to a config.json. Each key is read, known to be harmless, or rejected by name."""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.model.config_keys import PARTIAL
from exporter.model.family import Family, attention_only, families
from exporter.model.gguf_file import GgufFile
from exporter.model.gguf_header import HF_FOLDER, Header, shown_value
from exporter.model.gguf_names import EMBEDDING_NAME, HEAD_NAME
from exporter.model.gguf_rope import llama3_parameters
from exporter.model.limits import MAX_LAYERS
from exporter.model.tensors import require_finite

KEYS = "gguf_keys.toml"
FREQUENCY_FACTORS = "rope_freqs.weight"
# Those of `longrope`, for texts up to its original context and for longer ones.
LENGTH_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
# llama.cpp's default.
FREQUENCY_BASE = 10000.0
ROPE_TYPES = ("none", "linear", "yarn")


@dataclass(frozen=True)
class Keys:
    """The known keys of one architecture, without the prefix of its name and dot.

    Attributes:
        config: `model_type` in config.json.
        config_with_window: The same for a file with a sliding window.
        config_without_rotary: The same for a file whose key `rope.scaling.finetuned` is false, where that key switches
            rotary embeddings; None where it does not.
        honoured: Keys that config.json must reproduce.
        inert: Keys that change nothing.
        assumed: Key -> values that change nothing.
    """

    config: str
    config_with_window: str
    config_without_rotary: str | None
    honoured: frozenset[str]
    inert: frozenset[str]
    assumed: Mapping[str, list[Any]]


def known_keys() -> tuple[dict[str, Keys], dict[str, list[Any]]]:
    """Return architecture -> its keys, and the accepted values of `general.*`."""
    table = tomllib.loads((files("exporter.model") / KEYS).read_text(encoding="utf-8"))
    general, decoder = table.pop("general")["assumed"], table.pop("decoder")
    return {name: _keys(decoder, own) for name, own in table.items()}, general


def _keys(decoder: dict[str, Any], own: dict[str, Any]) -> Keys:
    assumed = own.get("assumed", {}).keys()
    return Keys(
        config=own["config"],
        config_with_window=own.get("config_with_window", own["config"]),
        config_without_rotary=own.get("config_without_rotary"),
        honoured=frozenset(decoder["honoured"] + own.get("honoured", [])) - assumed,
        inert=frozenset(decoder["inert"] | own.get("inert", {})) - assumed,
        assumed=decoder["assumed"] | own.get("assumed", {}),
    )


def read_config(file: GgufFile) -> dict[str, Any]:
    """Return the config.json of the model in a GGUF file, without special tokens.

    Raises:
        InputError: the architecture is not supported, a key is missing or unusable, or a key or the frequency factors
            change the model in a way that config.json cannot express.
    """
    known, general = known_keys()
    architecture = file.value("general.architecture")
    if not isinstance(architecture, str) or architecture not in known:
        raise InputError(
            f"the GGUF architecture {architecture!r} is not supported",
            where=file.path,
            expected="one of " + ", ".join(sorted(known)),
            next_step=HF_FOLDER,
        )
    header = Header(file, architecture)
    for key, accepted in general.items():
        header.require(f"general.{key}", accepted)
    _require_known(header, known[architecture])
    return _config(header, known[architecture])


def _require_known(header: Header, keys: Keys) -> None:
    """Reject unknown keys, and values that would change the model."""
    prefix = f"{header.architecture}."
    for name in header.file.fields:
        key = name.removeprefix(prefix)
        if key == name or key in keys.honoured or key in keys.inert:
            continue
        if key not in keys.assumed:
            raise InputError(
                f"the key {name!r} is not known to change nothing",
                where=header.file.path,
                got=shown_value(header.file.value(name)),
                expected="no such key",
                next_step=HF_FOLDER,
            )
        header.require(name, keys.assumed[key])


def _config(header: Header, keys: Keys) -> dict[str, Any]:
    file = header.file
    if EMBEDDING_NAME not in file.tensors or len(file.tensors[EMBEDDING_NAME].shape) != 2:
        raise InputError("the GGUF file holds no embedding", where=file.path, expected=f"the matrix {EMBEDDING_NAME}")
    hidden, heads = header.whole("embedding_length"), header.whole("attention.head_count")
    window = header.whole("attention.sliding_window", 0)
    model_type = keys.config_with_window if window else keys.config
    if keys.config_without_rotary is not None and not header.flag("rope.scaling.finetuned", True):
        model_type = keys.config_without_rotary
    (family,) = (family for family in families().values() if family.model_type == model_type)
    layers = header.whole("block_count")
    if layers > MAX_LAYERS:
        raise header.refused("block_count", "is too large", layers, f"at most {MAX_LAYERS}")
    head_dim = _head_width(header, hidden // max(heads, 1))
    config = {
        "architectures": [family.architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        family.width_key: header.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _key_value_heads(header, family, layers, heads),
        "head_dim": head_dim,
        **({} if family.activation_key is None else {family.activation_key: "silu"}),
        "max_position_embeddings": header.whole("context_length"),
        family.epsilon_key: header.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, family, head_dim),
        "tie_word_embeddings": HEAD_NAME not in file.tensors,
        "vocab_size": file.shape(EMBEDDING_NAME)[0],
    }
    if window:
        config |= {"sliding_window": window}
        # Qwen's max_window_layers counts the layers without a window; llama.cpp has no window for any layer.
        config |= {"use_sliding_window": True, "max_window_layers": 0} if model_type.startswith("qwen") else {}
    elif model_type.startswith("qwen"):
        config |= {"use_sliding_window": False}
    family.gguf.config(config, header)
    return config


def _head_width(header: Header, default: int) -> int:
    """Return the width of a head; values with another width are rejected, as by llama.cpp."""
    head_dim = header.whole("attention.key_length", default)
    _require_width(header, "attention.value_length", header.whole("attention.value_length", default), head_dim)
    return head_dim


def _require_width(header: Header, key: str, width: int, head_dim: int) -> None:
    if width != head_dim:
        raise header.refused(key, "is not the width of a head, which is not supported", width, head_dim)


def _key_value_heads(header: Header, family: Family, layers: int, heads: int) -> int:
    """Return the number of key-value heads; layers without any are convolutions, in families that have them."""
    if family.convolutions is attention_only:
        return header.whole("attention.head_count_kv", heads)
    by_layer = header.whole_by_layer("attention.head_count_kv", layers)
    found = set(by_layer) - {0}
    if len(found) != 1:
        raise InputError(
            f"the GGUF file has no usable '{header.architecture}.attention.head_count_kv'",
            where=header.file.path,
            got=shown_value(by_layer),
            expected="one number for all layers of attention, and 0 for the others",
        )
    return found.pop()


def _rope(header: Header, family: Family, head_dim: int) -> dict[str, Any]:
    """Return `rope_parameters`."""
    base = header.number("rope.freq_base", FREQUENCY_BASE)
    if base <= 1:
        raise InputError(f"'{header.architecture}.rope.freq_base' is not usable", where=header.file.path, got=base)
    width = header.whole("rope.dimension_count", head_dim)
    part = {}
    if PARTIAL in family.honoured and 0 < width < head_dim:
        part = {PARTIAL: width / head_dim}
    else:
        _require_width(header, "rope.dimension_count", width, head_dim)
    by_length = _length_factors(header, family, width)
    scaling = _scaling(header, scaled=bool(by_length))
    factors = by_length or _frequency_factors(header, family, width, base)
    if scaling and factors:
        tensor = LENGTH_FACTORS["short_factor"] if by_length else FREQUENCY_FACTORS
        raise InputError(
            f"the file scales its rotary embedding twice, by {tensor} and by keys",
            where=header.file.path,
            got=f"rope.scaling.type {scaling['rope_type']!r} with factor {scaling['factor']}",
            next_step=HF_FOLDER,
        )
    found = {"rope_type": "default"} | scaling | factors
    if found["rope_type"] not in family.gguf.rotary:
        raise InputError(
            f"rotary embeddings of type {found['rope_type']!r} are not supported for {header.architecture!r}",
            where=header.file.path,
            got=f"rope.scaling.type {header.text('rope.scaling.type', 'linear')!r}",
            expected="one of " + ", ".join(family.gguf.rotary),
            next_step=HF_FOLDER,
        )
    return {"rope_theta": base, **found, **part}


def _scaling(header: Header, scaled: bool) -> dict[str, Any]:
    """Return the parameters of the scaling keys; empty for none.

    Args:
        header: The header.
        scaled: The file holds `LENGTH_FACTORS`, with which a factor of cosines and sines goes.
    """
    kind = header.text("rope.scaling.type", "linear")
    if kind not in ROPE_TYPES:
        raise InputError(
            f"{header.architecture}.rope.scaling.type is not supported", where=header.file.path, got=repr(kind),
            expected="one of " + ", ".join(ROPE_TYPES), next_step=HF_FOLDER,
        )  # fmt: skip
    # The second key is the older name. 0 means none.
    factor = header.number("rope.scaling.factor", header.number("rope.scale_linear", 0.0)) or 1.0
    if kind == "yarn":
        return _yarn(header, factor)
    # llama.cpp multiplies cosines and sines by it for every type, transformers only for yarn.
    if not scaled:
        header.require(f"{header.architecture}.rope.scaling.attn_factor", [1.0])
    header.require(f"{header.architecture}.rope.scaling.yarn_attn_factor", [])
    return {} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(header: Header, factor: float) -> dict[str, Any]:
    """Return the YaRN parameters; llama.cpp multiplies the paper's factor of cosines and sines by the file's."""
    attention, by_paper = header.number("rope.scaling.attn_factor", 1.0), 1 + 0.1 * math.log(max(factor, 1))
    # llama.cpp computes with the paper's, whatever a file states.
    header.require(f"{header.architecture}.rope.scaling.yarn_attn_factor", [float(np.float32(by_paper))])
    if factor == attention == 1:
        return {}
    original = header.whole("rope.scaling.original_context_length", 0) or header.whole("context_length")
    found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return found if attention == 1 else found | {"attention_factor": attention * by_paper}


def _frequency_factors(header: Header, family: Family, width: int, base: float) -> dict[str, Any]:
    """Return the llama3 scaling parameters that give the file's frequency factors; empty for none."""
    stored = _factors(header, FREQUENCY_FACTORS, "llama3" in family.gguf.rotary, width)
    if stored is None:
        return {}
    found = llama3_parameters(stored, base)
    if found is None:
        raise InputError(
            "no parameters of llama3 scaling give the frequency factors of the file",
            where=f"{header.file.path}: {FREQUENCY_FACTORS}",
            next_step=f"{HF_FOLDER}, whose config.json says how its rotary embedding is scaled",
        )
    return {"rope_type": "llama3", **found} if found else {}


def _length_factors(header: Header, family: Family, width: int) -> dict[str, Any]:
    """Return the longrope parameters of a file that holds factors for short and long texts; empty for none."""
    used = "longrope" in family.gguf.rotary
    stored = {key: _factors(header, name, used, width) for key, name in LENGTH_FACTORS.items()}
    held = {key: factors.tolist() for key, factors in stored.items() if factors is not None}
    if len(held) == 1:
        missing = next(name for key, name in LENGTH_FACTORS.items() if key not in held)
        raise InputError(
            f"the tensor {missing} is missing", where=header.file.path, got=LENGTH_FACTORS[next(iter(held))],
            expected="factors for short and for long texts, or none", next_step="fetch the model again",
        )  # fmt: skip
    if not held:
        return {}
    original = header.whole("rope.scaling.original_context_length", 0) or header.whole("context_length")
    return {
        "rope_type": "longrope",
        **held,
        "original_max_position_embeddings": original,
        "attention_factor": header.number("rope.scaling.attn_factor", 1.0),
    }


def _factors(header: Header, name: str, used: bool, width: int) -> Float32 | None:
    """Return a tensor with a factor for each pair of a head's `width` channels that are turned; None for none."""
    file = header.file
    if name not in file.tensors:
        return None
    if not used:
        raise InputError(
            f"the GGUF file holds a tensor that {header.architecture!r} does not use: {name}",
            where=file.path,
            next_step=HF_FOLDER,
        )
    if file.shape(name) != (width // 2,):
        raise InputError(
            "the tensor has the wrong shape",
            where=f"{file.path}: {name}",
            got=list(file.shape(name)),
            expected=[width // 2],
        )
    return require_finite(file.decoded(name), name)


def used_tensors(file: GgufFile, names: Mapping[str, str], needed: Iterable[str]) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name of a model's tensors.

    Args:
        file: The file.
        names: Hugging Face name -> GGUF name of every tensor that a decoder may have.
        needed: Hugging Face names of this model's tensors.

    Raises:
        InputError: the file holds any other tensor.
    """
    used = {hf: names[hf] for hf in needed if names[hf] in file.tensors}
    extra = sorted(file.tensors.keys() - set(used.values()) - {FREQUENCY_FACTORS, *LENGTH_FACTORS.values()})
    if extra:
        raise InputError(
            f"the GGUF file holds a tensor that {file.value('general.architecture')!r} is not known to use: {extra[0]}",
            where=file.path,
            got=f"{len(extra)} such tensors",
            expected="none, since leaving them out would change the model",
            next_step=HF_FOLDER,
        )
    return used
