"""Families of decoders as data: the role of each tensor.

Families with the Llama layout differ only in the roles of their layers. To add one, add an entry to `FAMILIES`.
"""

from dataclasses import dataclass

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

# Matrices of a decoder layer: role -> (module path within the layer, site where its input is observed).
LINEARS: dict[str, tuple[str, str]] = {
    "q": ("self_attn.q_proj", "attention_in"),
    "k": ("self_attn.k_proj", "attention_in"),
    "v": ("self_attn.v_proj", "attention_in"),
    "o": ("self_attn.o_proj", "attention_out"),
    "gate": ("mlp.gate_proj", "mlp_in"),
    "up": ("mlp.up_proj", "mlp_in"),
    "down": ("mlp.down_proj", "mlp_out"),
}

# Vectors of a decoder layer: role -> tensor name within the layer.
NORMS = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
QK_NORMS = {"q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight"}
QKV_BIASES = {
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
}


@dataclass(frozen=True)
class Family:
    """One family of decoders.

    Attributes:
        model_type: `model_type` in config.json.
        architecture: Class name in config.json's `architectures`.
        gguf_architecture: `general.architecture` of a GGUF file.
        vectors: Role -> tensor name within a layer, for all vectors of a layer.
        rotary_interleaved_in_gguf: llama.cpp stores query and key rows of this family in its own order.
        gated: The feed-forward part is down(act(gate x) * up x), so its channels can be pruned.
    """

    model_type: str
    architecture: str
    gguf_architecture: str
    vectors: dict[str, str]
    rotary_interleaved_in_gguf: bool
    gated: bool = True


FAMILIES = {
    family.architecture: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", NORMS, True),
        Family("mistral", "MistralForCausalLM", "llama", NORMS, True),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", NORMS | QKV_BIASES, False),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", NORMS | QK_NORMS, False),
    )
}


def layer_tensor(layer: int, name: str) -> str:
    """Return the full name of a tensor within a decoder layer."""
    return f"model.layers.{layer}.{name}"
