"""Calibration text sampled from the model itself: no download, no private data.

A language model's own samples follow the distribution that its activations must serve (data-free calibration:
Liu et al. 2023, LLM-QAT, section 3.1). Half of the sequences start with the chat template's opening, so that the model
writes both sides of a conversation (Xu et al. 2024, Magpie). The others start with a random token.
"""

import numpy as np

from exporter.model.template import chat_opening
from exporter.model.tokenizer import ModelTokenizer


def starts(tokenizer: ModelTokenizer, count: int, seed: int) -> list[list[int]]:
    """Return the first tokens of `count` sequences, alternating between a chat's opening and a random token."""
    drawn = np.random.default_rng(seed).choice(np.array(tokenizer.ordinary_ids()), size=count)
    opening = opening_ids(tokenizer)
    return [opening if opening and index % 2 == 0 else [int(drawn[index])] for index in range(count)]


def opening_ids(tokenizer: ModelTokenizer) -> list[int]:
    """Return the tokens before the user's first words, or none if no chat template gives them."""
    if tokenizer.template is None:
        return []
    return tokenizer.inner_ids(chat_opening(tokenizer).text or "")


def notes(tokenizer: ModelTokenizer) -> tuple[str, ...]:
    """Note if sampled texts lack a chat's opening although the model has a template."""
    if tokenizer.template is None:
        return ()
    opening = chat_opening(tokenizer)
    if opening.text is not None:
        return ()
    return (
        f"text that the model writes begins without a chat's opening: its template takes no probe: {opening.reason}",
    )
