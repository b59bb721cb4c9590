"""Models whose every width divides by 256, so that llama.cpp's K and IQ types with blocks of 256 fit all matrices.

Two kinds: a small Qwen3 that is trained from a seed, whose weights are what training makes them; and any Llama put
into a wider one that computes the same function, for quality on a model that has something to lose.

The wider one carries a bias. Its weights are mixed by a random rotation and look Gaussian, with none of the outlying
columns that real weights have, which is easier for any even grid. And its residual stream keeps to as many directions
as before: with 576 of 768, a quarter of the directions never hold anything, so errors in them are free; error feedback
finds that, round to nearest cannot. Divergences of such a model compare formats and methods with each other; they do
not predict those of a real model of that width.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from exporter.model.decoder import EMBEDDING, HEAD
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.targets.contract import load_target
from tests.llama_names import LINEARS, NORMS, layer_tensor
from tests.models import KINDS, MORE_KINDS, TEMPLATE, own_keys
from tests.reference import reference_model

FINAL_NORM = "model.norm.weight"
BLOCK = 256
VOCAB = 2048
WINDOW, BATCH = 256, 4
# What `own_keys` has for smaller models.
WIDER: dict[str, dict[str, object]] = {
    # Its published models have a head of their own, and llama.cpp builds no other.
    "olmo2": {"tie_word_embeddings": False},
    "gemma4_text": {"vocab_size_per_layer_input": VOCAB},
    "granitemoehybrid": {"shared_intermediate_size": 768},
    "qwen3_moe": {"moe_intermediate_size": 256},
}
RATE, WARM_UP, CLIP = 3e-3, 20, 1.0


def embedded_reference(folder: Path, seed: int = 0) -> Path:
    """Write the reference model embedded in width 768, as `embedded` does it."""
    source = reference_model(folder.with_name(f"{folder.name}-source"), seed)
    try:
        return embedded(source, folder, seed)
    finally:
        shutil.rmtree(source)


def embedded(source: Path, folder: Path, seed: int = 0) -> Path:
    """Write a Llama as one of the next width that divides by 256, whose logits are the same.

    With P of orthonormal columns, [wide, hidden], the residual stream is P x: what writes to it is multiplied by P from
    the left, what reads it by P^T from the right. RMSNorm commutes with P only without gains, so these go into the
    matrices that follow; its mean over more dimensions is smaller by hidden / wide, so its epsilon is too, and its gain
    is the root of that share. Heads that are all zero, with key-value heads of their own, fill the attention up.

    The final norm's gain goes into the head, not into the embedding: a tied table becomes two, of which the file is
    larger by one. (One table with another final gain would do only if P^T diag(gain) P could be the old gain.)

    Args:
        source: A Hugging Face folder of a Llama.
        folder: Is made.
        seed: Of the rotation.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head_dim = config.get("head_dim") or hidden // heads
    wide = -(-hidden // BLOCK) * BLOCK
    wide_kv_heads = kv_heads
    while wide_kv_heads * (heads // kv_heads) * head_dim % BLOCK:
        wide_kv_heads += 1
    wide_heads = wide_kv_heads * (heads // kv_heads)
    tensors = _embedded_tensors(
        {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()},
        _orthonormal(wide, hidden, seed),
        config["num_hidden_layers"],
        {"q": wide_heads * head_dim, "k": wide_kv_heads * head_dim, "v": wide_kv_heads * head_dim},
    )
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config |= {
        "hidden_size": wide,
        "num_attention_heads": wide_heads,
        "num_key_value_heads": wide_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / wide,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    whole = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=chance, dtype=torch.float64))[0]


def _embedded_tensors(
    held: dict[str, torch.Tensor], wider: torch.Tensor, layers: int, rows: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the wider model; `rows` says how many the queries, keys and values have in it."""
    gain = torch.full((len(wider),), (wider.shape[1] / len(wider)) ** 0.5, dtype=torch.float64)
    head = held.get(HEAD, held[EMBEDDING])
    made = {EMBEDDING: held[EMBEDDING] @ wider.T, HEAD: head * held[FINAL_NORM] @ wider.T, FINAL_NORM: gain}
    for layer in range(layers):
        attention, feed_forward = (layer_tensor(layer, NORMS[role]) for role in ("attention_norm", "mlp_norm"))
        made |= {attention: gain.clone(), feed_forward: gain.clone()}
        for role, (module, _) in LINEARS.items():
            name = layer_tensor(layer, f"{module}.weight")
            weight = held[name]
            if role in ("o", "down"):
                weight = wider @ weight
                made[name] = _padded(weight.T, rows["q"]).T if role == "o" else weight
            else:
                weight = weight * held[attention if role in rows else feed_forward] @ wider.T
                made[name] = _padded(weight, rows[role]) if role in rows else weight
    return made


def _padded(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, 0, 0, rows - len(weight)))


def trained_qwen3(folder: Path, text: str, steps: int, seed: int = 0) -> Path:
    """Write a small Qwen3 and its tokenizer; see `trained`."""
    return trained(folder, text, steps, seed, "qwen3")


def trained(folder: Path, text: str, steps: int, seed: int, family: str) -> Path:
    """Write a small model of a family and its tokenizer, trained on a text for some steps of 1,024 tokens."""
    tokenizer = _tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    torch.manual_seed(seed)
    config_class, model_class = (KINDS | MORE_KINDS)[family]
    usual: dict[str, object] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = config_class(**usual | own_keys(family, 64, 4) | WIDER.get(family, {}))
    model = model_class(config)
    _train(model, tokens, steps, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train(model: PreTrainedModel, tokens: torch.Tensor, steps: int, seed: int) -> None:
    """Train on windows drawn from the text; the rate rises for some steps, then falls along a line to zero."""
    chance = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM_UP, (steps - step) / max(steps - WARM_UP, 1))
    )
    for _ in range(steps):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH, 1), generator=chance)
        batch = tokens[starts + torch.arange(WINDOW)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        chat_template=TEMPLATE,
    )


@torch.inference_mode()
def perplexity(folder: Path, text: str, windows: int = 16) -> float:
    """Return the perplexity of a model on the first windows of a text."""
    tokens = np.array(load_tokenizer(folder).ids(text)[: windows * WINDOW])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    batch = torch.from_numpy(tokens.reshape(windows, WINDOW))
    return float(model(input_ids=batch, labels=batch).loss.exp())


def bytes_below_small_blocks(model: Model) -> int:
    """Return the most bytes of a GGUF file that types with smaller blocks than 256 cannot be had for."""
    target = load_target("gguf")
    least = sum(
        min(
            format.stored_bytes(group.rows, group.columns)
            for storage in target.storages(model)
            if group in storage.groups
            for format in storage.formats
            if format.block_columns < BLOCK
        )
        for group in model.groups()
    )
    return target.fixed_bytes(model) + least - 1
