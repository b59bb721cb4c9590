"""The tensors of a Llama, written down once more: what the families' descriptions are tested against."""

# Role -> module within a layer, and the site where its input is observed.
LINEARS = {
    "q": ("self_attn.q_proj", "attention_in"),
    "k": ("self_attn.k_proj", "attention_in"),
    "v": ("self_attn.v_proj", "attention_in"),
    "o": ("self_attn.o_proj", "attention_out"),
    "gate": ("mlp.gate_proj", "mlp_in"),
    "up": ("mlp.up_proj", "mlp_in"),
    "down": ("mlp.down_proj", "mlp_out"),
}
NORMS = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}


def layer_tensor(layer: int, name: str) -> str:
    """Return the full name of a tensor within a layer."""
    return f"model.layers.{layer}.{name}"
