"""Ministral 3: Llama's block with `yarn`, and queries that grow with their position.

A query at position p is multiplied by 1 + beta ln(1 + floor(p / original)), where `original` is the number of positions
before `yarn`. onnxruntime-genai's model builder leaves this factor out, which is 1 at the first `original` positions.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.model.attention_windows import one_window
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, HeaderValue, Multimodal, OnnxDeclaration
from exporter.model.rotary import rope_parameters
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

BETA, ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the key of the factor of queries; `original` is a key of `yarn`, the only kind for which it is written."""
    return {"attention.temperature_scale": float(rope_parameters(config)[BETA])}


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the factor of queries to the config.json that a header gives, and read the key that replaces `yarn`'s factor.

    llama.cpp divides the factor of cosines and sines, 1 + 0.1 ln(factor), by 1 + 0.1 m ln(factor), where m is that key.

    Raises:
        InputError: the file states no factor of queries.
    """
    beta = header.number("attention.temperature_scale", 0.0)
    if not beta:
        raise header.refused(
            "attention.temperature_scale", "is missing or 0, which it is not in Ministral 3", beta, "a positive number"
        )
    rope = config["rope_parameters"]
    rope[BETA] = beta
    multiplier = header.number("rope.scaling.yarn_log_multiplier", 0.0)
    if multiplier:
        by_paper = 0.1 * math.log(max(rope["factor"], 1))
        rope["attention_factor"] = rope.get("attention_factor", 1 + by_paper) / (1 + multiplier * by_paper)


def positions_without_factor(config: PretrainedConfig) -> int:
    """Return the number of positions at which the factor of queries is 1."""
    original: int = rope_parameters(config)[ORIGINAL]
    return original


FAMILY = Family(
    model_type="ministral3",
    title="Ministral 3",
    architecture="Ministral3ForCausalLM",
    block=block,
    windows=one_window,
    gguf=GgufDeclaration(
        "mistral3", GGUF_TENSORS, interleaved_rotary=True, rotary=("yarn",), keys=header_keys, config=config_of
    ),
    onnx=OnnxDeclaration("MistralModel", ONNX_NODES, runtime_type="mistral", positions=positions_without_factor),
    multimodal=Multimodal(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        inert=(
            "image_token_index",
            "multimodal_projector_bias",
            "projector_hidden_act",
            "spatial_merge_size",
            "vision_config",
            "vision_feature_layer",
        ),
    ),
    rotary_honoured={BETA: "positive", ORIGINAL: "positions", "max_position_embeddings": "positions?"},
)
