"""LFM2 and LFM2.5: gated short convolutions, and layers of attention with norms of queries and keys among them.

A convolution keeps the last few positions of each channel instead of keys and values. The width of the feed-forward
parts follows from several keys of config.json. llama.cpp tells a convolution by its 0 key-value heads.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.attention_windows import FULL
from exporter.model.blocks import Block
from exporter.model.families.llama import GGUF_TENSORS, MODULES, ONNX_NODES, BlockParts
from exporter.model.family import Family, GgufDeclaration, HeaderValue, OnnxDeclaration
from exporter.model.limits import whole_number
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

CONVOLUTION = "conv"
MOST_POSITIONS = 64
OWN_MODULES = MappingProxyType(
    {
        **MODULES,
        "o": "self_attn.out_proj",
        "conv_in": "conv.in_proj",
        "conv_out": "conv.out_proj",
        "gate": "feed_forward.w1",
        "up": "feed_forward.w3",
        "down": "feed_forward.w2",
    }
)
OWN_TENSORS = MappingProxyType(
    {
        **GGUF_TENSORS,
        "conv_in": "shortconv.in_proj.weight",
        "conv_out": "shortconv.out_proj.weight",
        "conv_kernel": "shortconv.conv.weight",
    }
)
OWN_NODES = MappingProxyType({**ONNX_NODES, "conv_in": "conv/in_proj", "conv_out": "conv/out_proj"})


def block(shape: Shape, layer: int) -> Block:
    """Return a block of a convolution or attention, and a gated feed-forward part, each behind a norm."""
    part = BlockParts(shape, layer, modules=OWN_MODULES)
    norms = (part.norm("attention_norm", "operator_norm"), part.norm("mlp_norm", "ffn_norm"))
    feed_forward = part.feed_forward("ffn_norm", norms[1])
    positions = shape.convolutions[layer]
    if positions is None:
        heads = [part.norm(f"{role}_norm", f"self_attn.{role}_layernorm", shape.head_dim) for role in "qk"]
        return Block(layer, (part.attention("operator_norm", norms[0]), feed_forward), (*norms, *heads))
    kernel = part.kernel("conv_kernel", "conv.conv", positions)
    return Block(layer, (part.convolution("operator_norm", norms[0], kernel), feed_forward), (*norms, kernel))


def convolutions(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return the kernel of each layer that is a convolution.

    Raises:
        InputError: a layer is of another kind, one of the two is missing, or the kernel has a single position.
    """
    kinds = list(config.layer_types)
    if set(kinds) != {FULL, CONVOLUTION}:
        # llama.cpp aborts without a convolution, and onnxruntime-genai's model builder fails without attention.
        raise InputError(
            "layer_types names other kinds of layers than runtimes compute for LFM2", where=where,
            got=", ".join(sorted(set(kinds))), expected=f"{CONVOLUTION} and {FULL}, each at least once",
        )  # fmt: skip
    positions = whole_number(config, "conv_L_cache", where, MOST_POSITIONS)
    if positions == 1:
        raise InputError(
            "the convolutions have no earlier position to add", where=where, got="conv_L_cache 1", expected="2 or more",
            next_step="no target computes them",
        )  # fmt: skip
    return tuple(positions if kind == CONVOLUTION else None for kind in kinds)


def without_windows(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return None for each layer; `convolutions` checks their kinds."""
    return (None,) * len(config.layer_types)


def normalise(config: PretrainedConfig) -> None:
    """Give `intermediate_size` the width that transformers gives `Lfm2MLP`."""
    if not config.block_auto_adjust_ff_dim:
        return
    width, multiple = int(2 * config.intermediate_size / 3), config.block_multiple_of
    if config.block_ffn_dim_multiplier is not None:
        width = -(-int(config.block_ffn_dim_multiplier * width) // multiple) * multiple
    config.intermediate_size, config.block_auto_adjust_ff_dim = width, False


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the key of the kernel's width."""
    return {"shortconv.l_cache": config.conv_L_cache}


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the convolutions to the config.json that a header gives: the layers without key-value heads."""
    by_layer = header.whole_by_layer("attention.head_count_kv", config["num_hidden_layers"])
    config |= {
        "layer_types": [FULL if heads else CONVOLUTION for heads in by_layer],
        "conv_L_cache": header.whole("shortconv.l_cache"),
        "block_auto_adjust_ff_dim": False,
    }


def shim(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Show the builder the kinds of layers."""
    config.layer_types = list(original.layer_types)


FAMILY = Family(
    model_type="lfm2",
    title="LFM2, LFM2.5",
    architecture="Lfm2ForCausalLM",
    block=block,
    windows=without_windows,
    convolutions=convolutions,
    normalise=normalise,
    gguf=GgufDeclaration(
        "lfm2",
        OWN_TENSORS,
        square_queries=True,
        final_norm="token_embd_norm.weight",
        keys=header_keys,
        config=config_of,
    ),
    onnx=OnnxDeclaration("LFM2Model", OWN_NODES, shim),
    final_norm="embedding_norm",
    epsilon_key="norm_eps",
    activation_key=None,
    refused_flags=("conv_bias",),
    honoured={
        "block_auto_adjust_ff_dim": "flag",
        "block_ff_dim": "width",
        "block_ffn_dim_multiplier": "positive?",
        "block_multiple_of": "width",
        "conv_L_cache": "layers",
        "conv_bias": "flag",
        "full_attn_idxs": "layer numbers?",
        "norm_eps": "positive",
        "tie_embedding": "flag",
        # Of published models; transformers reads none of them.
        "block_dim": "width",
        "block_mlp_init_scale": "positive",
        "block_norm_eps": "positive",
        "block_out_init_scale": "positive",
        "block_use_xavier_init": "flag",
        "conv_dim": "width",
        "conv_dim_out": "width",
        "conv_use_xavier_init": "flag",
        "num_heads": "width",
    },
    only={"block_use_swiglu": True, "theta": 1000000.0, "use_pos_enc": True},
)
