"""The token that pads prompts to whole windows: one that no text gives.

onnxruntime-genai takes the first padding token for the end of a prompt, so a prompt that contains one is cut there.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from exporter.foundation.errors import RequestError
from exporter.model.tokenizer import ModelTokenizer

# Bytes that UTF-8 never uses: as tokens of byte fallback, and as the characters that stand for them in byte-level BPE.
NEVER = (0xC0, 0xC1, *range(0xF5, 0x100))
BYTE_TOKENS = (*(f"<0x{byte:02X}>" for byte in NEVER), *map(chr, NEVER))


@dataclass(frozen=True)
class Padding:
    """A padding token.

    Attributes:
        token: Its id.
        definition: The tokenizer.json of the pipeline, in which no text gives the token.
    """

    token: int
    definition: dict[str, Any]


def padding_token(tokenizer: ModelTokenizer, rows: int) -> Padding:
    """Return a padding token.

    It is a row of the embedding without a token, or else the token of a byte that UTF-8 never uses, or else a special
    token that no chat template names and that has no role; this one is then no longer recognised in texts.

    Args:
        tokenizer: The model's tokenizer.
        rows: Rows of the embedding.

    Raises:
        RequestError: there is none.
    """
    definition = tokenizer.definition
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    added = {one["content"]: one["id"] for one in definition.get("added_tokens", [])}
    known = {*vocabulary.values(), *added.values()}
    unknown = next((token for token in range(rows - 1, -1, -1) if token not in known), None)
    if unknown is not None:
        return Padding(unknown, definition)
    never = [vocabulary[name] for name in _byte_tokens(definition) if name in vocabulary and name not in added]
    if never:
        return Padding(never[-1], definition)
    spare = _spare(tokenizer, added)
    if not spare:
        raise RequestError(
            "the pipeline for neural processors needs a padding token that no text gives, and the tokenizer has none",
            where=tokenizer.where,
        )
    token = max(spare)
    kept = [one for one in definition["added_tokens"] if one["id"] != token]
    return Padding(token, definition | {"added_tokens": kept})


def _byte_tokens(definition: dict[str, Any]) -> Iterable[str]:
    """Return the names of bytes that UTF-8 never uses, in the form of this tokenizer."""
    if definition["model"].get("byte_fallback"):
        return [name for name in BYTE_TOKENS if len(name) > 1]
    byte_level = '"ByteLevel"' in json.dumps(definition.get("pre_tokenizer"))
    return [name for name in BYTE_TOKENS if len(name) == 1] if byte_level else []


def _spare(tokenizer: ModelTokenizer, added: dict[str, int]) -> list[int]:
    """Return the special tokens that have no role and that no chat template names."""
    templates = "\n".join(tokenizer.templates.values())
    special = {one["content"] for one in tokenizer.definition["added_tokens"] if one.get("special")}
    roles = set(tokenizer.roles.values())
    return [token for name, token in added.items() if name in special and token not in roles and name not in templates]
