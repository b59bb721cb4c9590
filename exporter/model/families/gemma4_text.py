"""Gemma 4 E2B and E4B, text: Gemma 3's norms with plain gains, and inputs of each layer's own, made of the token.

Layers without a window have wider heads, of which rotary embeddings turn a part. The last layers have no keys and
values: they attend to those of the last layer of their kind that has some, and their feed-forward parts may be wider.
Queries, keys and values are normalised, the last without a gain; nothing else scales the attention. Each layer ends by
multiplying the stream by a number, and a cap bends the logits. The larger models of the series, which lack the layers'
own inputs or have experts, are refused. onnxruntime-genai's model builder knows only those.

Facts of llama.cpp are those of its `gemma4` graph in llama-cpp-python 0.3.36.
"""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.attention_windows import FULL, SLIDING, windows_by_layer
from exporter.model.blocks import Block
from exporter.model.families.gemma3_text import ROUNDED_GELU_KL
from exporter.model.families.llama import GGUF_TENSORS, MODULES, BlockParts
from exporter.model.family import VISION, Family, GgufDeclaration, HeaderValue, Multimodal, Refusal
from exporter.model.limits import whole_number
from exporter.model.rotary import head_width
from exporter.model.shape import Shape

OWN_MODULES = MappingProxyType(
    {**MODULES, "input_gate": "per_layer_input_gate", "input_projection": "per_layer_projection"}
)
OWN_TENSORS = MappingProxyType(
    {
        **GGUF_TENSORS,
        "input_gate": "inp_gate.weight",
        "input_projection": "proj.weight",
        "input_after_norm": "post_norm.weight",
        "layer_scale": "layer_output_scale.weight",
    }
)
OUTSIDE = MappingProxyType(
    {
        "layer_embedding": "per_layer_token_embd.weight",
        "layer_projection": "per_layer_model_proj.weight",
        "layer_projection_norm": "per_layer_proj_norm.weight",
    }
)


def block(shape: Shape, layer: int) -> Block:
    """Return a block of attention, a gated feed-forward part, and what adds the layer's own input."""
    part = BlockParts(shape, layer, modules=OWN_MODULES)
    before_attention, after_attention, before_mlp, after_mlp, after_input = (
        part.norm("attention_norm", "input_layernorm"),
        part.norm("attention_after_norm", "post_attention_layernorm"),
        part.norm("mlp_norm", "pre_feedforward_layernorm"),
        part.norm("mlp_after_norm", "post_feedforward_layernorm"),
        part.norm("input_after_norm", "post_per_layer_input_norm"),
    )
    normed = "qk" if shape.key_layers[layer] is None else "q"
    heads = [part.norm(f"{role}_norm", f"self_attn.{role}_norm", shape.head_dims[layer]) for role in normed]
    scale = part.vector("layer_scale", "layer_scalar", 1)
    return Block(
        layer,
        (
            part.attention("input_layernorm", before_attention, after_attention, values_normed=True),
            part.feed_forward("pre_feedforward_layernorm", before_mlp, after_mlp),
            part.layer_input("per_layer_input_gate", after_input),
        ),
        (
            before_attention, after_attention, before_mlp, after_mlp, after_input, *heads, scale,
        ),
        scale,
    )  # fmt: skip


def head_dims(config: PretrainedConfig, where: object) -> tuple[int, ...]:
    """Return the width of a head in each layer.

    Raises:
        InputError: layers of one kind have several.
    """
    widths = tuple(whole_number(one, "head_dim", where) for one in config.per_layer_config)
    by_kind = set(zip(config.layer_types, widths, strict=True))
    if len(by_kind) > len(set(config.layer_types)):
        raise InputError(
            "layers of one kind have heads of several widths", where=where,
            got=", ".join(f"{kind} {width}" for kind, width in sorted(by_kind)), expected="one width for each kind",
        )  # fmt: skip
    return widths


def key_layers(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return the last layer of its kind with keys and values for each layer that has none.

    Raises:
        InputError: no layer of that kind has any.
    """
    kinds, shared = list(config.layer_types), config.num_kv_shared_layers
    own = kinds[: max(len(kinds) - shared, 0)]
    if shared and set(own) != set(kinds):
        raise InputError(
            "no layer of some kind of attention has keys and values of its own", where=where,
            got=f"num_kv_shared_layers {shared} of {len(kinds)} layers",
            expected="a layer of each kind before those that share keys and values",
        )  # fmt: skip
    last = {kind: layer for layer, kind in enumerate(own)}
    return tuple(None if layer < len(own) else last[kind] for layer, kind in enumerate(kinds))


def width_factors(config: PretrainedConfig, where: object) -> tuple[int, ...]:
    """Return 2 for each layer without keys and values if config.json asks for it, 1 for the others."""
    wide = 2 if config.use_double_wide_mlp else 1
    return tuple(1 if other is None else wide for other in key_layers(config, where))


def layer_input_width(config: PretrainedConfig, where: object) -> int:
    """Return the width of the layers' own inputs.

    Raises:
        InputError: they have none, or not for each token.
    """
    width, tokens = config.hidden_size_per_layer_input, config.vocab_size_per_layer_input
    if not width:
        raise InputError(
            "the layers have no inputs of their own, as in the larger models of the series", where=where,
            got=f"hidden_size_per_layer_input {width}", expected="a width, as in E2B and E4B",
            next_step="no target carries such models yet",
        )  # fmt: skip
    if tokens != config.vocab_size:
        raise InputError(
            "the table of the layers' own inputs has other tokens than the vocabulary", where=where,
            got=f"vocab_size_per_layer_input {tokens}", expected=f"vocab_size, {config.vocab_size}",
        )  # fmt: skip
    return whole_number(config, "hidden_size_per_layer_input", where)


def logits_cap(config: PretrainedConfig) -> float | None:
    """Return the cap of the logits."""
    cap: float | None = config.final_logit_softcapping
    return cap


def unused(shape: Shape) -> Collection[str]:
    """Return the names of tensors of keys and values in layers without, which published models have nevertheless."""
    return {
        f"model.layers.{layer}.self_attn.{name}.weight"
        for layer, other in enumerate(shape.key_layers)
        if other is not None
        for name in ("k_proj", "v_proj", "k_norm", "v_norm")
    }


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of windows, shared keys and values, inputs of layers and the cap.

    Widths without a suffix are those of layers without a window. Without the key, llama.cpp caps logits at 30.
    """
    narrow = head_width(config, SLIDING)
    return {
        "final_logit_softcapping": float(shape.logits_cap or 0),
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in config.layer_types],
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "attention.shared_kv_layers": sum(other is not None for other in shape.key_layers),
        "rope.dimension_count_swa": narrow,
        "rope.freq_base_swa": float(config.rope_parameters[SLIDING]["rope_theta"]),
        "embedding_length_per_layer_input": shape.layer_input_width,
    }


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse keys and values from other layers than llama.cpp takes: the last but one with a window, the last without.

    It also takes layers without a window to have the wider heads, as this package writes them.
    """
    kinds = list(config.layer_types)
    if set(kinds) != {FULL, SLIDING}:
        return Refusal("layer_types", ", ".join(sorted(set(kinds))), f"{SLIDING} and {FULL}")
    own = [kind for kind, other in zip(kinds, shape.key_layers, strict=True) if other is None]
    if len(own) < len(kinds) and own[-2:] != [SLIDING, FULL]:
        last = f"{SLIDING}, {FULL} as the last two layers with keys and values of their own"
        return Refusal("layer_types", ", ".join(own[-2:]), last)
    wide, narrow = (head_width(config, kind) for kind in (FULL, SLIDING))
    return Refusal("global_head_dim", wide, f"head_dim, {narrow}, or more") if wide < narrow else None


FAMILY = Family(
    model_type="gemma4_text",
    title="Gemma 4 E2B, E4B (text)",
    architecture="Gemma4ForCausalLM",
    block=block,
    windows=windows_by_layer,
    head_dims=head_dims,
    key_layers=key_layers,
    width_factors=width_factors,
    layer_input_width=layer_input_width,
    logits_cap=logits_cap,
    unused=unused,
    gguf=GgufDeclaration(
        "gemma4",
        OWN_TENSORS,
        activations=("gelu_pytorch_tanh",),
        rotary=("proportional",),
        outside=OUTSIDE,
        with_widths="gemma4",
        keys=header_keys,
        refusal=refusal,
        # Attention without a scale is sharp: random models of five layers, as many as an excerpt has, are up to 1.4e-6
        # nats from transformers, and below 1e-10 with their gates at zero.
        most_lowering_kl=ROUNDED_GELU_KL,
    ),
    carries_windows=True,
    embedding_scale=lambda config: math.sqrt(config.hidden_size),
    activation_key="hidden_activation",
    rotary_kinds=(FULL, SLIDING),
    honoured={
        "final_logit_softcapping": "positive?",
        "global_head_dim": "width?",
        "hidden_activation": "activation",
        "hidden_size_per_layer_input": "whole?",
        "num_kv_shared_layers": "whole",
        "per_layer_config": "widths of heads?",
        "use_double_wide_mlp": "flag?",
        "vocab_size_per_layer_input": "width?",
    },
    # What images attend to, of which a text has none.
    only={"use_bidirectional_attention": "vision"},
    multimodal=Multimodal(
        "gemma4",
        "Gemma4ForConditionalGeneration",
        inert=(
            "audio_config", "audio_token_id", "boa_token_id", "boi_token_id", "eoa_token_id", "eoa_token_index",
            "eoi_token_id", "image_token_id", "video_token_id", "vision_config", "vision_soft_tokens_per_image",
        ),
        left_out=(
            *VISION, "model.audio_tower.*", "model.embed_audio.*", "model.embed_vision.*",
        ),
    ),
)  # fmt: skip
