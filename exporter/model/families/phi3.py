"""Phi-3, Phi-3.5-mini, Phi-4-mini: Llama's block with queries, keys and values in one tensor, and gate and up in one.

Long-context models scale their rotary embeddings by `longrope`; Phi-4-mini turns a part of each head. llama.cpp ignores
the window of `phi3` files, and so does onnxruntime-genai's model builder.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.model.attention_windows import one_window
from exporter.model.blocks import Block
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, BlockParts
from exporter.model.family import Family, GgufDeclaration, HeaderValue, OnnxDeclaration
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

# transformers prefers this key to that of the rotary embedding, and has a default for it.
ORIGINAL = "original_max_position_embeddings"
FUSED = MappingProxyType(
    dict.fromkeys(("q", "k", "v"), "attn_qkv.weight") | dict.fromkeys(("gate", "up"), "ffn_up.weight")
)


def block(shape: Shape, layer: int) -> Block:
    """Return a block of attention and a gated feed-forward part, each behind a norm."""
    part = BlockParts(shape, layer)
    norms = (part.norm("attention_norm", "input_layernorm"), part.norm("mlp_norm", "post_attention_layernorm"))
    return Block(
        layer,
        (
            part.attention("input_layernorm", norms[0], stored_in="self_attn.qkv_proj"),
            part.feed_forward("post_attention_layernorm", norms[1], stored_in="mlp.gate_up_proj"),
        ),
        norms,
    )


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the key of the window, without which llama.cpp does not load a file; 0 is none."""
    return {"attention.sliding_window": 0}


def config_of(config: dict[str, Any], header: "Header") -> None:
    """State the original context of a `longrope` model where transformers reads it."""
    if ORIGINAL in config["rope_parameters"]:
        config[ORIGINAL] = config["rope_parameters"][ORIGINAL]


FAMILY = Family(
    model_type="phi3",
    title="Phi-3, Phi-3.5-mini, Phi-4-mini, Phi-4",
    architecture="Phi3ForCausalLM",
    block=block,
    windows=one_window,
    gguf=GgufDeclaration(
        "phi3",
        MappingProxyType({**GGUF_TENSORS, **FUSED}),
        rotary=("default", "longrope"),
        keys=header_keys,
        config=config_of,
    ),
    onnx=OnnxDeclaration("Phi3MiniModel", ONNX_NODES),
    rotary_names={"su": "longrope", "yarn": "longrope"},
    honoured={"partial_rotary_factor": "share?"},
    only={"full_attn_mod": 1, "interpolate_factor": 1},
    adopted_code=("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM", "Xenova/gpt-4o"),
)
