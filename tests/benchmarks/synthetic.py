"""Models of a real model's shape with random weights: what memory and time depend on, without a download."""

import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from exporter.model.decoder import Decoder
from exporter.model.tensors import INDEX, SINGLE
from tests.models import TEMPLATE

SHARD_BYTES = 512 << 20
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def tinyllama_1b(layers: int = 22) -> LlamaConfig:
    """Return the shape of TinyLlama-1.1B."""
    return _llama(hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_key_value_heads=4)


def llama_2_7b(layers: int = 32) -> LlamaConfig:
    """Return the shape of Llama-2-7B."""
    return _llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_key_value_heads=32)


def _llama(**shape: int) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=32000,
        num_attention_heads=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        dtype="bfloat16",
        **shape,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def synthetic_model(folder: Path, config: LlamaConfig, seed: int = 0) -> Path:
    """Write a random model in bfloat16 as a Hugging Face folder, shard by shard, and return the folder.

    Matrices keep the size of what they multiply, so that activations stay as large as a trained model's.
    """
    config.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(_shards(Decoder.of(config, folder), seed)):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def hollow_model(folder: Path, config: LlamaConfig) -> Path:
    """Write a model whose weights are a hole in a sparse file: enough to plan with, and no disk is used."""
    config.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    header: dict[str, object] = {}
    at = 0
    for name, shape in _shapes(Decoder.of(config, folder)).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


def _shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return {group.name: (group.rows, group.columns) for group in decoder.groups()} | decoder.vectors()


def _shards(decoder: Decoder, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    chance = torch.Generator().manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(decoder).items():
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
        if len(shape) == 1:
            values = 1 + torch.randn(shape, generator=chance) / 10
        else:
            values = torch.randn(shape, generator=chance) * (1.0 if "embed" in name else shape[1] ** -0.5)
        shard[name] = values.bfloat16()
    yield shard


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of so many tokens, trained on Python's own modules."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer.train_from_iterator((file.read_text("utf-8") for file in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1],
        chat_template=TEMPLATE,
    )  # fmt: skip
