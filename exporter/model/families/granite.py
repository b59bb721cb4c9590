"""Granite 3 and dense Granite 4: Llama's blocks, with factors of embeddings, attention, residuals and logits."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from exporter.model.attention_windows import no_window
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, HeaderValue, OnnxDeclaration
from exporter.model.shape import Shape


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of the factors."""
    return {
        "attention.scale": float(config.attention_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


FAMILY = Family(
    model_type="granite",
    title="Granite 3",
    architecture="GraniteForCausalLM",
    block=block,
    windows=no_window,
    gguf=GgufDeclaration("granite", GGUF_TENSORS, interleaved_rotary=True, keys=header_keys),
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
