"""Gemma 3, text: norms before and after each sublayer, norms of queries and keys, two kinds of attention by layer.

Norms multiply by 1 + w. Embeddings are multiplied by the square root of their width. Layers with a window have rotary
embeddings of their own. Facts of llama.cpp are those of its `gemma3` graph in llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.model.attention_windows import FULL, SLIDING, windows_by_layer
from exporter.model.blocks import Block
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, BlockParts
from exporter.model.family import Family, GgufDeclaration, HeaderValue, Multimodal, OnnxDeclaration, Refusal
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

# llama.cpp takes the attention scale from the width of a head, but for the model of 27 billion parameters, which it
# knows by its depth.
DEPTH_OF_27B = 62
# What it assumes where the header does not say: every sixth layer has no window; the base of the others.
PERIOD, BASE_WITH_WINDOW = 6, 10000.0
ACTIVATION = "gelu_pytorch_tanh"
# ggml looks GELU up in a table of float16. The real model of 270 million parameters is 1.1e-6 nats from transformers on
# text of its own; on 96 tokens of prose 3.7e-7, and 1.5e-7 where transformers rounds GELU likewise.
ROUNDED_GELU_KL = 1e-5


def block(shape: Shape, layer: int) -> Block:
    """Return a block of attention and a gated feed-forward part, each between two norms."""
    part = BlockParts(shape, layer, offset=1.0)
    before_attention, after_attention, before_mlp, after_mlp = (
        part.norm("attention_norm", "input_layernorm"),
        part.norm("attention_after_norm", "post_attention_layernorm"),
        part.norm("mlp_norm", "pre_feedforward_layernorm"),
        part.norm("mlp_after_norm", "post_feedforward_layernorm"),
    )
    heads = [part.norm(f"{role}_norm", f"self_attn.{role}_norm", shape.head_dim) for role in "qk"]
    return Block(
        layer,
        (
            part.attention("input_layernorm", before_attention, after_attention),
            part.feed_forward("pre_feedforward_layernorm", before_mlp, after_mlp),
        ),
        (before_attention, after_attention, before_mlp, after_mlp, *heads),
    )


def embedding_scale(config: PretrainedConfig) -> float:
    """Return the factor of embeddings."""
    return math.sqrt(config.hidden_size)


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of windows and of the second rotary embedding; without them llama.cpp assumes a period of 6."""
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in config.layer_types],
        "rope.freq_base_swa": float(config.rope_parameters[SLIDING]["rope_theta"]),
    }


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Change the config.json that a header gives: two rotary embeddings, windows by layer, and what is built in."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    windowed = header.flags("attention.sliding_window_pattern", layers, PERIOD)
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == DEPTH_OF_27B else head_dim
    config["hidden_activation"] = ACTIVATION
    config["query_pre_attn_scalar"] = scale
    config["layer_types"] = [SLIDING if one and config.get("sliding_window") else FULL for one in windowed]
    config["rope_parameters"] = {
        FULL: config["rope_parameters"],
        SLIDING: {"rope_type": "default", "rope_theta": header.number("rope.freq_base_swa", BASE_WITH_WINDOW)},
    }


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse an attention scale that llama.cpp, which has no key for it, does not compute."""
    width = shape.hidden // shape.heads if shape.layers == DEPTH_OF_27B else shape.head_dim
    if config.query_pre_attn_scalar == width:
        return None
    return Refusal("query_pre_attn_scalar", config.query_pre_attn_scalar, width)


def shim(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Give the builder one flat rotary embedding and the base of the second, as it expects them."""
    config.rope_local_base_freq = original.rope_parameters[SLIDING]["rope_theta"]


FAMILY = Family(
    model_type="gemma3_text",
    title="Gemma 3 (text)",
    architecture="Gemma3ForCausalLM",
    block=block,
    windows=windows_by_layer,
    gguf=GgufDeclaration(
        "gemma3",
        GGUF_TENSORS,
        activations=(ACTIVATION,),
        keys=header_keys,
        refusal=refusal,
        config=config_of,
        most_lowering_kl=ROUNDED_GELU_KL,
    ),
    onnx=OnnxDeclaration("Gemma3Model", ONNX_NODES, shim),
    carries_windows=True,
    embedding_scale=embedding_scale,
    activation_key="hidden_activation",
    rotary_kinds=(FULL, SLIDING),
    honoured={
        "hidden_activation": "activation",
        "query_pre_attn_scalar": "width",
        "rope_local_base_freq": "positive?",
        "sliding_window_pattern": "layers?",
    },
    multimodal=Multimodal(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        inert=(
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
            "mm_tokens_per_image",
            "vision_config",
        ),
    ),
)
