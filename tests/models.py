"""Small random models that the tests make from a seed."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from exporter.model.blocks import Block
from exporter.model.decoder import Decoder
from exporter.model.shape import Shape

KINDS = {
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
    "lfm2": (Lfm2Config, Lfm2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(KINDS)
# Families that only one target builds, or that differ from one above in little: not every test runs on them.
MORE_KINDS = {
    "gemma4_text": (Gemma4TextConfig, Gemma4ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "granitemoehybrid": (GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
ALL_FAMILIES = (*KINDS, *MORE_KINDS)
VOCAB = 320
TEXT = ["the capital of France is Paris", "numbers 12 345 6789", "hello, world! it's a test", "  spaces   and\nlines"]
# Like the published models, it scales the rotary embeddings of layers without a window.
OLMO3_ROPE = {
    "full_attention": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    tied: bool = True,
    hidden: int = 64,
    layers: int = 2,
    intermediate: int = 96,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, object] = MappingProxyType({}),
    kind: tuple[type, type] | None = None,
) -> Path:
    """Write a random model with a trained byte-level tokenizer as a Hugging Face folder.

    Args:
        folder: Where.
        family: `model_type`.
        seed: Of its weights.
        tied: Whether the embedding is the head.
        hidden: Width of the residual stream; there are four heads.
        layers: Number of layers.
        intermediate: Feed-forward width.
        shards: Whether there are several files.
        dtype: Of the weights.
        changes: Other keys of its config.
        kind: Classes of its config and model, for a family that is not in `KINDS`.
    """
    torch.manual_seed(seed)
    config_class, model_class = (KINDS | MORE_KINDS)[family] if kind is None else kind
    usual = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = config_class(**usual | own_keys(family, hidden // 4, layers) | dict(changes))
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the usual start, so that logits differ enough for an oracle to see a fault.
            gain = 0.0 if family == "gemma3_text" else 1.0
            parameter.normal_(gain if "norm" in name else 0.0, 0.1 if "norm" in name else 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.7, 1.3)
    size = "200KB" if shards > 1 else "5GB"
    model.save_pretrained(folder, max_shard_size=size)
    _tokenizer().save_pretrained(folder)
    return folder


def own_keys(family: str, head: int, layers: int) -> dict[str, object]:
    """Return the keys of config.json that a family needs besides those of all, for heads of some width."""
    # Published models damp what layers add to the stream, and a random model's logits would show no fault in them.
    granite: dict[str, object] = {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 0.5,
    }  # fmt: skip
    keys: dict[str, dict[str, object]] = {
        "gemma3_text": {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": head,
            "sliding_window": 16,
            "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],
        },
        # Up to half of the layers have no keys and values; the last two that have are of both kinds.
        "gemma4_text": {
            "global_head_dim": 2 * head, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": (layers - 1) // 2, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0,
            "sliding_window": 16,
            "layer_types": [
                ("sliding_attention", "full_attention")[layer in (layers // 2, layers - 1)] for layer in range(layers)
            ],
        },
        "granite": granite,
        "granitemoehybrid": granite | {
            "layer_types": ["full_attention"] * layers, "num_local_experts": 0, "position_embedding_type": "rope",
            "shared_intermediate_size": 96,
        },
        "lfm2": {
            "layer_types": [("conv", "full_attention")[layer % 3 == 1] for layer in range(layers)],
            "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.4,
        },
        # Copied, since transformers adds to what it is given.
        "olmo3": {"sliding_window": 16, "rope_parameters": {kind: dict(rope) for kind, rope in OLMO3_ROPE.items()}},
        "qwen3_moe": {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        },
    }  # fmt: skip
    return keys.get(family, {})


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 10, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=TEMPLATE,
    )


def without_gate(decoder: Decoder) -> Decoder:
    """Return a decoder whose description names no channels of a gated part."""

    def block(shape: Shape, layer: int) -> Block:
        described = decoder.family.block(shape, layer)
        return replace(described, sublayers=tuple(replace(one, channels=None) for one in described.sublayers))

    return replace(decoder, family=replace(decoder.family, block=block))


def tensor_digests(path: Path) -> dict[str, tuple[str, str]]:
    """Return the type and the SHA-256 of the data of every tensor of a GGUF file, by gguf's own reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: (t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()) for t in tensors}


def counting_model(folder: Path, eos: int | None = 1) -> Path:
    """Write a model in which the token after each is the next one, and after the last the first.

    Args:
        folder: Where.
        eos: The token that its tokenizer calls its end; None for none.
    """
    tiny_model(folder, tied=False, layers=1)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 1e-4) if "proj" in name else parameter.fill_(1)
        tokens = torch.nn.functional.normalize(torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(0)))
        model.model.embed_tokens.weight.copy_(tokens)
        model.lm_head.weight.copy_(tokens.roll(1, 0))
    model.save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None if eos is None else tokenizer.convert_ids_to_tokens(eos)
    tokenizer.save_pretrained(folder)
    return folder
