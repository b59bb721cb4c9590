"""Calibration text that the model itself samples: no download, no private data.

A language model's own samples follow the distribution that its activations must serve (data-free calibration:
Liu et al. 2023, LLM-QAT, section 3.1). Half of the sequences begin as the chat template begins, so that the model
writes both sides of a conversation (Xu et al. 2024, Magpie); the others begin with a random token.
"""

import numpy as np
from transformers import PreTrainedTokenizerBase

PROBE = "\u0001"


def starts(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[list[int]]:
    """Return the first tokens of `count` sequences, a chat's opening and random tokens in turn."""
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(tokenizer.vocab_size) if token not in special])
    drawn = np.random.default_rng(seed).choice(ordinary, size=count)
    opening = chat_opening(tokenizer)
    return [opening if opening and index % 2 == 0 else [int(drawn[index])] for index in range(count)]


def chat_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that come before a user's first words, or none without a chat template."""
    if tokenizer.chat_template is None:
        return []
    chat = [{"role": "user", "content": PROBE}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False)).split(PROBE)[0]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
