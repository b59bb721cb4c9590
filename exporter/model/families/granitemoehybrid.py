"""Granite 4.0 without Mamba layers and without experts: Granite's block, whose feed-forward part is the shared expert.

Gate and up are rows of one tensor. Some models have no rotary embeddings. llama.cpp knows such models as `granite`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.attention_windows import FULL, no_window
from exporter.model.blocks import Block
from exporter.model.families.granite import FAMILY as GRANITE
from exporter.model.families.granite import config_of as config_of_granite
from exporter.model.families.granite import header_keys as keys_of_granite
from exporter.model.families.llama import GGUF_TENSORS, MODULES, ONNX_NODES, BlockParts
from exporter.model.family import Family, GgufDeclaration, HeaderValue, OnnxDeclaration
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header


def block(shape: Shape, layer: int) -> Block:
    """Return a block of attention and a gated feed-forward part, each behind a norm."""
    part = BlockParts(shape, layer, modules={**MODULES, "down": "shared_mlp.output_linear"})
    norms = (part.norm("attention_norm", "input_layernorm"), part.norm("mlp_norm", "post_attention_layernorm"))
    return Block(
        layer,
        (
            part.attention("input_layernorm", norms[0]),
            part.feed_forward("post_attention_layernorm", norms[1], stored_in="shared_mlp.input_linear"),
        ),
        norms,
    )


def windows(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return no window for each layer.

    Raises:
        InputError: a layer is a Mamba layer.
    """
    others = [kind for kind in config.layer_types if kind != FULL]
    if others:
        raise InputError(
            "the model has Mamba layers, which no target carries", where=where,
            got=f"{len(others)} of {len(config.layer_types)} layers", expected="attention in every layer",
            next_step="use a model of the family without them: of Granite 4.0, one without an H in its name",
        )  # fmt: skip
    return no_window(config, where)


def no_experts(config: PretrainedConfig, where: object) -> None:
    """Return None.

    Raises:
        InputError: the model has experts.
    """
    if config.num_local_experts:
        raise InputError(
            "the model has experts beside its shared feed-forward part, which no target carries", where=where,
            got=f"num_local_experts {config.num_local_experts}", expected="0", next_step="use a dense model",
        )  # fmt: skip


def rotates(config: PretrainedConfig) -> bool:
    """Return whether queries and keys have rotary embeddings."""
    return bool(config.position_embedding_type == "rope")


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return Granite's keys and, under a name that says something else, llama.cpp's switch of rotary embeddings."""
    return {**keys_of_granite(shape, config), "rope.scaling.finetuned": rotates(config)}


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the factors to the config.json that a header gives, for a model without rotary embeddings.

    A file of a model with rotary embeddings is read as Granite 3, which computes the same.
    """
    config_of_granite(config, header)
    config |= {
        "layer_types": [FULL] * config["num_hidden_layers"],
        "num_local_experts": 0,
        "position_embedding_type": "nope",
    }


FAMILY = Family(
    model_type="granitemoehybrid",
    title="Granite 4.0 without Mamba layers and experts",
    architecture="GraniteMoeHybridForCausalLM",
    block=block,
    windows=windows,
    gguf=GgufDeclaration("granite", GGUF_TENSORS, interleaved_rotary=True, keys=header_keys, config=config_of),
    onnx=OnnxDeclaration("GraniteMoEHybridModel", ONNX_NODES),
    embedding_scale=GRANITE.embedding_scale,
    residual_scale=GRANITE.residual_scale,
    logits_divisor=GRANITE.logits_divisor,
    experts=no_experts,
    rotates=rotates,
    width_key="shared_intermediate_size",
    honoured={
        **GRANITE.honoured,
        # transformers checks that these two go together, although nothing is computed with them.
        "mamba_expand": "width?",
        "mamba_n_heads": "width?",
        "num_local_experts": "whole",
        "position_embedding_type": "name?",
        "shared_intermediate_size": "width",
    },
    only={"normalization_function": "rmsnorm"},
    inert=("init_method", "mamba_*", "num_experts_per_tok", "router_aux_loss_coef", "time_step_limit"),
)
