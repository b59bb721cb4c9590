"""The vocabulary of a GGUF file: tokens, merges, special tokens, chat template."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import GGUFValueType, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from exporter.errors import InputError
from exporter.model.tensors import open_gguf

SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: llama.cpp's kind of tokenizer: byte-level BPE is `gpt2`, BPE over SentencePiece's pieces is `llama`.
        pre_tokenizer: llama.cpp's name for how a text is split before merging.
        tokens: Text of every token, in the order of ids.
        types: Kind of every token.
        merges: Pairs in the order of rank, for `gpt2`.
        scores: The higher the earlier a token is formed, for `llama`.
        add_space_prefix: A space is put before the text.
        special: What gguf's own library writes: special ids, flags, chat template.
    """

    model: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool
    special: gguf.SpecialVocab


def copy_vocabulary(writer: GGUFWriter, source: Path) -> None:
    """Add every key `tokenizer.*` of a GGUF file unchanged, types included.

    Raises:
        InputError: the file is damaged, or holds no vocabulary.
    """
    fields = [field for name, field in open_gguf(source).fields.items() if name.startswith("tokenizer.")]
    if not any(field.name == gguf.Keys.Tokenizer.LIST for field in fields):
        raise InputError(
            "the GGUF file holds no vocabulary",
            where=source,
            expected=gguf.Keys.Tokenizer.LIST,
            next_step="give the model with its tokenizer",
        )
    copy_fields(writer, fields)


def copy_fields(writer: GGUFWriter, fields: Iterable[gguf.ReaderField]) -> None:
    """Add keys of a GGUF file unchanged, types included."""
    for field in fields:
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, _value(field), field.types[0], inner)


def _value(field: gguf.ReaderField) -> Any:
    """Return what a field holds; strings as bytes, since a token need not be valid UTF-8."""
    parts = [field.parts[index] for index in field.data]
    texts = field.types[-1] == GGUFValueType.STRING
    values = [part.tobytes() if texts else part[0].item() for part in parts]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> Vocabulary:
    """Return what a GGUF file must say of a tokenizer, its pre-tokenizer still to be proven.

    Raises:
        InputError: the tokenizer is not BPE, or its tokens do not fit the embedding.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = _is_byte_level(settings, folder)
    tokens, types = _tokens(tokenizer, folder, vocab_size)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in settings["model"]["merges"]]
    if not byte_level:
        types = [
            TokenType.BYTE if BYTE_TOKEN.fullmatch(token) else kind for token, kind in zip(tokens, types, strict=True)
        ]
        if isinstance(tokenizer.unk_token_id, int):
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre_tokenizer="default",
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs] if byte_level else [],
        scores=[] if byte_level else _scores(tokens, pairs),
        add_space_prefix=not byte_level and _prepends_space(settings),
        special=_special(tokenizer, folder, vocab_size),
    )


def _is_byte_level(settings: dict[str, Any], folder: Path) -> bool:
    model = settings["model"]
    byte_level = any(part["type"] == "ByteLevel" for part in components(settings["pre_tokenizer"]))
    if model["type"] == "BPE" and (byte_level or model.get("byte_fallback")):
        return byte_level
    raise InputError(
        "llama.cpp has no such tokenizer",
        where=folder,
        got=f"{model['type']} with byte_level={byte_level} and byte_fallback={bool(model.get('byte_fallback'))}",
        expected="byte-level BPE, or BPE with byte fallback",
        next_step="lower the model to onnx instead",
    )


def components(section: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the components of a normaliser or pre-tokenizer, sequences flattened."""
    if section is None:
        return
    inner = section.get("pretokenizers", section.get("normalizers"))
    if inner is None:
        yield section
    for part in inner or ():
        yield from components(part)


def _prepends_space(settings: dict[str, Any]) -> bool:
    found = [*components(settings["normalizer"]), *components(settings["pre_tokenizer"])]
    return any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in found)


def _tokens(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Return text and kind of every id below `vocab_size`."""
    held = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    largest = max(held, default=-1)
    if largest >= vocab_size:
        raise InputError(
            "the tokenizer has more tokens than the embedding has rows",
            where=folder,
            got=f"id {largest}, {held[largest]!r}",
            expected=f"ids below {vocab_size}",
            next_step="check that tokenizer and weights belong together",
        )
    added = tokenizer.added_tokens_decoder
    tokens = [held.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(tokens)) != vocab_size or len(held) != len(tokenizer.get_vocab()):
        raise InputError("two tokens share a text or an id", where=folder, next_step="fetch the tokenizer again")
    types = [_kind(i in held, added[i].special if i in added else None) for i in range(vocab_size)]
    return tokens, types


def _kind(used: bool, special: bool | None) -> TokenType:
    """Return the kind of a token; `special` is None unless it was added to the vocabulary."""
    if not used:
        return TokenType.UNUSED
    if special is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _scores(tokens: list[str], pairs: Iterable[list[str]]) -> list[float]:
    """Return minus the rank of the merge that forms a token; what no merge forms comes last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, folder: Path, vocab_size: int) -> gguf.SpecialVocab:
    """Return special ids, the flags as the tokenizer behaves, and the chat template."""
    try:
        special = gguf.SpecialVocab(folder, special_token_types=SPECIAL_ROLES, n_vocab=vocab_size)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError("the special tokens cannot be read", where=folder, got=error) from error
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in SPECIAL_ROLES}
    special.special_token_ids |= {role: token for role, token in ids.items() if isinstance(token, int)}
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    special.add_special_token = {
        "bos": whole[: len(whole) - len(plain)][:1] == [ids["bos"]],
        "eos": whole[len(plain) :][-1:] == [ids["eos"]],
    }
    template = tokenizer.chat_template
    named = (
        [{"name": name, "template": text} for name, text in template.items()] if isinstance(template, dict) else None
    )
    special.chat_template = named or template
    return special


def write_vocabulary_file(file: Path, vocabulary: Vocabulary) -> None:
    """Write a GGUF file that holds a vocabulary and nothing else."""
    writer = GGUFWriter(file, "llama")
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the keys `tokenizer.*`."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)
