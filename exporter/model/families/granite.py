"""Granite 3 and dense Granite 4: Llama's blocks, with factors of embeddings, attention, residuals and logits."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.model.attention_windows import no_window
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, HeaderValue, OnnxDeclaration
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

# Key in the header of a GGUF file -> key of config.json.
FACTORS = MappingProxyType(
    {
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
)


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of the factors."""
    factors = {key: float(getattr(config, name)) for key, name in FACTORS.items()}
    return {"attention.scale": float(config.attention_multiplier), **factors}


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the factors to the config.json that a header gives; llama.cpp takes a factor of 0 as none."""
    config["attention_multiplier"] = header.number("attention.scale", 0.0) or config["head_dim"] ** -0.5
    for key, name in FACTORS.items():
        config[name] = header.number(key, 0.0) or 1.0


FAMILY = Family(
    model_type="granite",
    title="Granite 3",
    architecture="GraniteForCausalLM",
    block=block,
    windows=no_window,
    gguf=GgufDeclaration("granite", GGUF_TENSORS, interleaved_rotary=True, keys=header_keys, config=config_of),
    onnx=OnnxDeclaration("GraniteModel", ONNX_NODES),
    embedding_scale=lambda config: float(config.embedding_multiplier),
    residual_scale=lambda config: float(config.residual_multiplier),
    logits_divisor=lambda config: float(config.logits_scaling),
    honoured={
        "attention_multiplier": "positive",
        "embedding_multiplier": "positive",
        "logits_scaling": "positive",
        "residual_multiplier": "positive",
    },
)
