"""Recognises folders that do not hold a floating-point model, and suggests the next step."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.json_file import read_json_object_if_there

ADAPTER = "adapter_config.json"
# Types of safetensors whose values need no scales.
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# `quant_method` in config.json -> its usual name.
METHODS = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitnet": "BitNet",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FP8 with scales",
    "fp8": "FP8 with scales",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "torchao": "torchao",
}
# Keys of config.json that indicate quantised weights -> the method if they name none.
KEYS = {"quantization_config": "", "compression_config": "compressed-tensors", "quantization": "MLX"}
# Files that quantisers write next to the weights.
QUANTISERS = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "NVIDIA ModelOpt"}
# Tensor names that indicate quantised weights; the first match gives the method.
SIGNS = {
    r"\.g_idx$": "GPTQ",
    r"\.qweight$": "GPTQ or AWQ",
    r"\.weight_packed$": "compressed-tensors",
    r"\.absmax$|\.quant_state\.|\.SCB$": "bitsandbytes",
    r"\.weight_scale_inv$|\.scale_weight$|_scale$": "FP8 with scales",
    r"\.W_q$": "HQQ",
    r"\.biases$|\.scales$": "MLX",
    r"\._data$": "Quanto",
    r"\.qdata$": "torchao",
}
WEIGHTS = "model.safetensors or model.safetensors.index.json"
SAVE = "load it with transformers where you trust it, and save it with save_pretrained"
# Files that a folder may hold instead of safetensors weights: pattern, description, next step.
INSTEAD = (
    ("*.gguf", "holds a GGUF file, {}", "give that file itself"),
    ("model.*.safetensors", "holds a variant alone, {}", "name its files as those of a model without a variant"),
    ("model.safetensors.index.*.json", "holds a variant alone, {}", "name its files as those of a model without one"),
    ("consolidated*.safetensors", "holds Mistral's own format, {}", "give the model in Hugging Face's format"),
    ("pytorch_model*.bin", "holds weights in pickles, {}, which may run code and are not read", SAVE),
    ("*.pth", "holds weights in pickles, {}, which may run code and are not read", SAVE),
    ("*.pt", "holds weights in pickles, {}, which may run code and are not read", SAVE),
    ("tf_model*.h5", "holds TensorFlow weights, {}", SAVE),
    ("flax_model*.msgpack", "holds Flax weights, {}", SAVE),
    ("*.onnx", "holds an ONNX model, {}, which is lowered already", "give the model that it was made from"),
    ("onnx/*.onnx", "holds an ONNX model, {}, which is lowered already", "give the model that it was made from"),
)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter instead of a model.

    Raises:
        InputError: it holds both, of which transformers would use the adapter on the base that it names.
    """
    path = folder / ADAPTER
    if not path.exists():
        return False
    if _first(folder, ("model*.safetensors",)):
        raise InputError(
            "the folder holds a model and beside it an adapter",
            where=path,
            expected="one of them",
            next_step="move the adapter into a folder of its own, and name this one with --base",
        )
    return True


def refuse_quantised(raw: Mapping[str, Any], where: object) -> None:
    """Reject weights that config.json declares as quantised; null means not quantised.

    Raises:
        InputError: see above.
    """
    for key, usual in KEYS.items():
        settings = raw.get(key)
        if settings is not None:
            raise _quantised(_method(settings) or usual, where, f"{key} in config.json")


def refuse_quantised_tensors(folder: Path, types: Mapping[str, str]) -> None:
    """Reject weights whose names or types show that they are quantised.

    Args:
        folder: The folder; a quantiser's file next to the weights also gives the method.
        types: Name -> type of each tensor as named by safetensors.

    Raises:
        InputError: see above.
    """
    for sign, method in SIGNS.items():
        name = next(filter(re.compile(sign).search, types), None)
        if name is not None:
            raise _quantised(_named_beside(folder) or method, folder, f"a tensor {name}")
    for name, type in types.items():
        if name.endswith(".weight") and type not in FLOATS:
            raise _quantised(_named_beside(folder), folder, f"{name} of type {type}")


def no_weights(folder: Path) -> InputError:
    """Return the error for a folder without safetensors weights, naming what it holds instead."""
    for pattern, what, next_step in INSTEAD:
        if found := _first(folder, (pattern,)):
            told = what.format(found.relative_to(folder))
            return InputError(f"the folder {told}", where=folder, expected=WEIGHTS, next_step=next_step)
    save = "save the model with save_pretrained(safe_serialization=True)"
    return InputError("the folder holds no safetensors weights", where=folder, expected=WEIGHTS, next_step=save)


def no_config(folder: Path) -> InputError:
    """Return the error for a folder without config.json, naming what it holds instead."""
    if not _first(folder, ("model*.safetensors",)) and _first(folder, [pattern for pattern, _, _ in INSTEAD]):
        return no_weights(folder)
    return InputError("the folder holds no config.json", where=folder, next_step="give a Hugging Face model folder")


def _first(folder: Path, patterns: Iterable[str]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _method(settings: object) -> str:
    if not isinstance(settings, dict):
        return ""
    named = settings.get("quant_method")
    if isinstance(named, str):
        return METHODS.get(named, shown(named))
    return "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & set(settings) else ""


def _named_beside(folder: Path) -> str:
    """Return the method named by a quantiser's own file."""
    for file, usual in QUANTISERS.items():
        settings = read_json_object_if_there(folder / file)
        if settings is not None:
            return _method(settings) or usual
    return ""


def _quantised(method: str, where: object, got: str) -> InputError:
    told = f" ({method})" if method else ""
    next_step = "give the model before quantisation"
    return InputError(f"the weights are already quantised{told}", where=where, got=got, next_step=next_step)
