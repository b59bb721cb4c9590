"""Texts that llama.cpp is known to tokenise in another way than the tokenizer from which a vocabulary was written."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import TokenType

from exporter.model.gguf_reader import open_gguf
from exporter.model.llama_vocabulary import ROUGH_IN_CASE
from exporter.model.sentencepiece_file import SPACE

# The key under which a file states what its vocabulary cannot show: as JSON, pattern -> reason of texts that the
# model's tokenizer treats otherwise.
DIFFERENCES = "edge_exporter.tokenizer_differences"
ATTRIBUTES: dict[int, int] = {
    TokenType.UNKNOWN: llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN,
    TokenType.CONTROL: llama_cpp.LLAMA_TOKEN_ATTR_CONTROL,
    TokenType.USER_DEFINED: llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED,
}
# Pre-tokenizers that take letters outside of ASCII for both cases, so that words with capitals may be split elsewhere.
# Others that do so (gpt-4o, tekken) also split words at combining marks.
ONE_CASE = frozenset({"granite-embed-multi-97m"})
CAPITAL = r"[[\p{Lu}\p{Lt}]&&[^A-Z]]"
BEFORE_CAPITAL = "|".join(
    (
        r"[[\p{L}\p{M}]&&[^a-zA-Z]][A-Z]",
        rf"\p{{Ll}}[\p{{Lm}}\p{{Lo}}\p{{M}}]*{CAPITAL}",
        # Letters without case are capitals to these pre-tokenizers, unless the word ends with capitals.
        rf"[\p{{Lm}}\p{{Lo}}\p{{M}}]{CAPITAL}+(?![\p{{L}}\p{{M}}])",
    )
)


def by_pre_tokenizer(name: str | None) -> dict[str, str]:
    """Return pattern -> reason of the texts that a pre-tokenizer of llama.cpp splits roughly."""
    if name not in ONE_CASE:
        return {}
    return {BEFORE_CAPITAL: "llama.cpp knows no case outside of ASCII, and splits words before capitals differently"}


def by_vocabulary(path: Path, model: Any, *, special: bool) -> dict[str, str]:
    """Return pattern -> reason of the texts that a file's vocabulary treats in another way than its tokenizer.

    Args:
        path: The GGUF file.
        model: llama.cpp's pointer to it.
        special: Whether the text of a special token is parsed as that token.
    """
    fields = open_gguf(path).fields
    types: list[int] = fields["tokenizer.ggml.token_type"].contents()
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    found = {
        re.escape(tokens[i]): f"llama.cpp changes the kind of the token {tokens[i]!r} by its text"
        for i in _retyped(model, types, special)
    }
    spaces = [token for token in tokens if len(token) > 1 and not token.strip(SPACE)]
    if spaces and fields["tokenizer.ggml.model"].contents() == "llama":
        # llama.cpp makes these tokens of spaces by merging, and cannot tell such a character from a space.
        found[SPACE * min(map(len, spaces))] = f"llama.cpp takes {SPACE!r} for a space"
    stated = json.loads(fields[DIFFERENCES].contents()) if DIFFERENCES in fields else {}
    pre_tokenizer = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else None
    if pre_tokenizer in ROUGH_IN_CASE:
        found[r"[\p{L}&&[^a-zA-Z]]"] = "llama.cpp splits words with letters outside of ASCII only roughly"
    return found | stated | by_pre_tokenizer(pre_tokenizer)


def _retyped(model: Any, types: list[int], special: bool) -> Iterator[int]:
    """Yield the tokens that llama.cpp finds in a text as a whole though their types do not say so, or the reverse."""
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    for number, kind in enumerate(types):
        written, held = ATTRIBUTES.get(kind, 0), llama_cpp.llama_vocab_get_attr(vocabulary, number)
        if _is_whole(written, special) != _is_whole(held, special):
            yield number


def _is_whole(attributes: int, special: bool) -> bool:
    """Return whether llama.cpp finds a token with these attributes in a text as a whole."""
    if attributes & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN):
        return special
    return bool(attributes & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED)
