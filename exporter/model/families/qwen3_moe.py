"""Qwen3 with experts: in each layer, a router sends each token to some gated feed-forward parts.

onnxruntime-genai's model builder does not build it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.attention_windows import no_window
from exporter.model.blocks import Block
from exporter.model.families.llama import GGUF_TENSORS, BlockParts
from exporter.model.family import Family, GgufDeclaration, HeaderValue, Refusal
from exporter.model.limits import MAX_EXPERTS, whole_number
from exporter.model.shape import Experts, Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

EXPERT_TENSORS = MappingProxyType(
    {
        "router": "ffn_gate_inp.weight",
        "expert_gate": "ffn_gate_exps.weight",
        "expert_up": "ffn_up_exps.weight",
        "expert_down": "ffn_down_exps.weight",
    }
)


def block(shape: Shape, layer: int) -> Block:
    """Return a block of attention, with norms of queries and keys head by head, and experts."""
    part = BlockParts(shape, layer)
    norms = (part.norm("attention_norm", "input_layernorm"), part.norm("mlp_norm", "post_attention_layernorm"))
    heads = [part.norm(f"{role}_norm", f"self_attn.{role}_norm", shape.head_dim) for role in "qk"]
    return Block(
        layer,
        (part.attention("input_layernorm", norms[0]), part.experts("post_attention_layernorm", norms[1])),
        (*norms, *heads),
    )


def experts(config: PretrainedConfig, where: object) -> Experts:
    """Return the experts; every layer has as many.

    Raises:
        InputError: some layers have none, or a token uses more than there are.
    """
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise InputError(
            "some layers have no experts, which no target carries", where=where,
            got=f"mlp_only_layers {config.mlp_only_layers}, decoder_sparse_step {config.decoder_sparse_step}",
            expected="experts in every layer",
        )  # fmt: skip
    count = whole_number(config, "num_experts", where, MAX_EXPERTS)
    return Experts(
        count,
        whole_number(config, "num_experts_per_tok", where, count),
        whole_number(config, "moe_intermediate_size", where),
    )


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of the experts."""
    assert shape.experts is not None
    return {
        "expert_count": shape.experts.count,
        "expert_used_count": shape.experts.used,
        "expert_feed_forward_length": shape.experts.width,
    }


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the experts to the config.json that a header gives; llama.cpp always divides their weights by the sum."""
    used = header.whole("expert_used_count")
    config |= {
        "num_experts": header.whole("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": header.whole("expert_feed_forward_length", 0)
        or config["intermediate_size"] // max(used, 1),
        "norm_topk_prob": True,
    }


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse weights of experts that do not sum to one: llama.cpp divides them by their sum."""
    return None if config.norm_topk_prob else Refusal("norm_topk_prob", False, True)


FAMILY = Family(
    model_type="qwen3_moe",
    title="Qwen3 with experts",
    architecture="Qwen3MoeForCausalLM",
    block=block,
    windows=no_window,
    gguf=GgufDeclaration(
        "qwen3moe",
        MappingProxyType({**GGUF_TENSORS, **EXPERT_TENSORS}),
        keys=header_keys,
        refusal=refusal,
        config=config_of,
    ),
    experts=experts,
    honoured={
        "decoder_sparse_step": "width?",
        "mlp_only_layers": "layer numbers?",
        "moe_intermediate_size": "width",
        "norm_topk_prob": "flag?",
        "num_experts": "width",
        "num_experts_per_tok": "width",
        "num_local_experts": "width?",
        # For training.
        "output_router_logits": "flag?",
        "router_aux_loss_coef": "positive?",
    },
    only={"qk_norm": True, "use_qk_norm": True},
)
