"""OLMo 2: no norm before attention and feed-forward part but one after each; queries and keys normalised as a whole.

onnxruntime-genai's model builder knows only the first OLMo.
"""

from transformers import PretrainedConfig

from exporter.model.attention_windows import no_window
from exporter.model.blocks import Block
from exporter.model.families.llama import GGUF_TENSORS, BlockParts
from exporter.model.family import Family, GgufDeclaration, Refusal
from exporter.model.shape import Shape


def block(shape: Shape, layer: int) -> Block:
    """Return a block whose sublayers read the residual stream as it is."""
    part = BlockParts(shape, layer)
    after_attention = part.norm("attention_after_norm", "post_attention_layernorm")
    after_mlp = part.norm("mlp_after_norm", "post_feedforward_layernorm")
    heads = [
        part.norm(f"{role}_norm", f"self_attn.{role}_norm", count * shape.head_dim)
        for role, count in (("q", shape.heads), ("k", shape.kv_heads))
    ]
    return Block(
        layer,
        (
            part.attention("self_attn.q_proj", None, after_attention),
            part.feed_forward("mlp.gate_proj", None, after_mlp),
        ),
        (after_attention, after_mlp, *heads),
    )


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse a tied head: llama.cpp reads one of its own."""
    return Refusal("tie_word_embeddings", True, False) if shape.tied else None


FAMILY = Family(
    model_type="olmo2",
    title="OLMo 2",
    architecture="Olmo2ForCausalLM",
    block=block,
    windows=no_window,
    gguf=GgufDeclaration(
        "olmo2",
        GGUF_TENSORS,
        square_queries=True,
        refusal=refusal,
    ),
)
