"""The vocabulary of a GGUF file: tokens, merges, special tokens, chat template."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import GGUFValueType, GGUFWriter, TokenType

from exporter.foundation.errors import InputError
from exporter.model.ends import special_ids
from exporter.model.gguf_reader import open_gguf
from exporter.model.sentencepiece_file import SPACE, Pieces
from exporter.model.tokenizer import ModelTokenizer
from exporter.model.tokenizer_files import components
from exporter.model.tokenizer_notes import DEFAULT

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp takes the name of a model for its tokenizer's: under the first, special tokens but some take the white space
# after them, and a file without the tokens of the second is not loaded. The third is about a token of encoders.
PHI3, PHI3_TOKENS = "phi-3", ("</s>", "<unk>", "<s>", "<|endoftext|>")
TELLING_NAMES = re.compile("(phi)-?(3)|(modern)-(bert)", re.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        model: llama.cpp's kind of tokenizer: byte-level BPE is `gpt2`, BPE over SentencePiece's pieces is `llama`.
        pre_tokenizer: llama.cpp's name for how a text is split before merging.
        tokens: Text of every token, in the order of ids.
        types: Kind of every token.
        merges: Pairs in the order of rank, for `gpt2`.
        scores: Tokens with higher scores are formed earlier, for `llama`.
        add_space_prefix: A space is put before the text.
        strips: Special tokens take the white space after them, as Phi-3's do.
        special: Special tokens and chat templates.
    """

    model: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    scores: list[float]
    add_space_prefix: bool
    strips: bool
    special: "SpecialTokens"


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens and chat templates as a GGUF file describes them.

    Attributes:
        ids: Role -> id; the roles are those of gguf's own library.
        add_bos: BOS is put before a text.
        add_eos: EOS is put after a text.
        ends: Ids at which a text ends.
        templates: Chat templates by name.
    """

    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    ends: tuple[int, ...]
    templates: Mapping[str, str]


def copy_vocabulary(writer: GGUFWriter, source: Path, name: str) -> None:
    """Add every key `tokenizer.*` of a GGUF file unchanged, types included, and a name that llama.cpp takes alike.

    Raises:
        InputError: the file is damaged, or holds no vocabulary.
    """
    held = open_gguf(source).fields
    fields = [field for name, field in held.items() if name.startswith("tokenizer.")]
    if not any(field.name == gguf.Keys.Tokenizer.LIST for field in fields):
        raise InputError(
            "the GGUF file holds no vocabulary",
            where=source,
            expected=gguf.Keys.Tokenizer.LIST,
            next_step="give the model with its tokenizer",
        )
    copy_fields(writer, fields)
    own = held[gguf.Keys.General.NAME].contents() if gguf.Keys.General.NAME in held else ""
    add_name(writer, name, strips=isinstance(own, str) and tells_phi3(own))


def tells_phi3(name: str) -> bool:
    """Return whether llama.cpp takes a file of this name for one with Phi-3's tokenizer."""
    return any(found.group(1) for found in TELLING_NAMES.finditer(name))


def add_name(writer: GGUFWriter, name: str, *, strips: bool) -> None:
    """Add the name of a model, changed so that llama.cpp infers nothing wrong from it.

    Args:
        writer: Receives the key.
        name: The name.
        strips: See `Vocabulary.strips`.
    """
    if strips:
        writer.add_name(name if tells_phi3(name) else f"{name} ({PHI3} tokenizer)")
    else:
        writer.add_name(TELLING_NAMES.sub(lambda found: " ".join(filter(None, found.groups())), name))


def copy_fields(writer: GGUFWriter, fields: Iterable[gguf.ReaderField]) -> None:
    """Add keys of a GGUF file unchanged, types included."""
    for field in fields:
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, _value(field), field.types[0], inner)


def _value(field: gguf.ReaderField) -> Any:
    """Return the value of a field; strings as bytes, since a token need not be valid UTF-8."""
    parts = [field.parts[index] for index in field.data]
    texts = field.types[-1] == GGUFValueType.STRING
    values = [value for part in parts for value in ([part.tobytes()] if texts else part.tolist())]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


def read_vocabulary(tokenizer: ModelTokenizer, folder: Path, vocab_size: int) -> Vocabulary:
    """Return the vocabulary of a tokenizer for a GGUF file; its pre-tokenizer is not verified yet.

    Args:
        tokenizer: The tokenizer.
        folder: Holds config.json and generation_config.json, which may name special tokens too.
        vocab_size: Rows of the embedding; ids that the tokenizer does not use become `[PADn]`.

    Raises:
        InputError: the tokenizer is not BPE, or its tokens do not fit the embedding.
    """
    settings = tokenizer.definition
    byte_level = _is_byte_level(settings, folder)
    tokens, types = _tokens(tokenizer, folder, vocab_size)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in settings["model"]["merges"]]
    scores = [] if byte_level else _scores(tokens, pairs)
    if tokenizer.pieces is not None:
        _put_pieces(tokenizer.pieces, tokens, types, scores)
    elif not byte_level:
        types = [TokenType.BYTE if BYTE_TOKEN.fullmatch(t) else kind for t, kind in zip(tokens, types, strict=True)]
        _merge_spaces(tokens, types, pairs)
        if "unk" in tokenizer.roles:
            types[tokenizer.roles["unk"]] = TokenType.UNKNOWN
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre_tokenizer="default",
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs] if byte_level else [],
        scores=scores,
        add_space_prefix=not byte_level and _prepends_space(settings),
        strips=set(PHI3_TOKENS) <= set(tokens) and bool(stripping(tokenizer)),
        special=_special(tokenizer, folder, vocab_size),
    )


def stripping(tokenizer: ModelTokenizer) -> list[str]:
    """Return the texts of the special tokens that take the white space after them."""
    return [token.content for token in tokenizer.added().values() if token.rstrip and token.special]


def _merge_spaces(tokens: list[str], types: list[TokenType], pairs: Iterable[list[str]]) -> None:
    """Make added tokens that stand for runs of spaces ordinary tokens if merges form them.

    The tokenizer finds the added token only in a text with the character itself, but merges spaces to it. llama.cpp
    writes the text of an added token unchanged, and that of an ordinary token with spaces.
    """
    formed = {"".join(pair) for pair in pairs}
    for number, token in enumerate(tokens):
        if types[number] == TokenType.USER_DEFINED and not token.strip(SPACE) and token in formed:
            types[number] = TokenType.NORMAL


def _put_pieces(pieces: Pieces, tokens: list[str], types: list[TokenType], scores: list[float]) -> None:
    """Set types and scores as SentencePiece does; llama.cpp looks for user-defined texts before it marks spaces."""
    scores[: len(pieces.scores)] = pieces.scores
    for number, kind in enumerate(map(TokenType, pieces.types)):
        if kind != TokenType.NORMAL:
            types[number] = kind
        if kind == TokenType.USER_DEFINED:
            tokens[number] = tokens[number].replace(SPACE, " ")


def _is_byte_level(settings: dict[str, Any], folder: Path) -> bool:
    model = settings["model"]
    byte_level = any(part["type"] == "ByteLevel" for part in components(settings["pre_tokenizer"]))
    if model["type"] == "BPE" and (byte_level or model.get("byte_fallback")):
        return byte_level
    raise InputError(
        "no such tokenizer is written for llama.cpp",
        where=folder,
        got=f"{model['type']} with byte_level={byte_level} and byte_fallback={bool(model.get('byte_fallback'))}",
        expected="byte-level BPE, or BPE with byte fallback",
        next_step="lower the model to onnx instead" if model["type"] == "BPE" else "use a model with a BPE tokenizer",
    )


def _prepends_space(settings: dict[str, Any]) -> bool:
    found = [*components(settings["normalizer"]), *components(settings["pre_tokenizer"])]
    return any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in found)


def _tokens(tokenizer: ModelTokenizer, folder: Path, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Return text and kind of every id below `vocab_size`."""
    vocabulary = tokenizer.backend.get_vocab()
    held = {token_id: token for token, token_id in vocabulary.items()}
    added = tokenizer.added()
    tokens = [held.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(tokens)) != vocab_size or len(held) != len(vocabulary):
        raise InputError("two tokens share a text or an id", where=folder, next_step="fetch the tokenizer again")
    types = [_kind(i in held, added[i].special if i in added else None) for i in range(vocab_size)]
    return tokens, types


def _kind(used: bool, special: bool | None) -> TokenType:
    """Return the kind of a token; `special` is None unless the token was added to the vocabulary."""
    if not used:
        return TokenType.UNUSED
    if special is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _scores(tokens: list[str], pairs: Iterable[list[str]]) -> list[float]:
    """Return minus the rank of the merge that forms each token; tokens without a merge come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(ranks))) for token in tokens]


def _special(tokenizer: ModelTokenizer, folder: Path, vocab_size: int) -> SpecialTokens:
    found = special_ids(folder, tokenizer.roles, vocab_size)
    ids = dict(found.roles)
    return SpecialTokens(
        ids=ids,
        add_bos=tokenizer.before[:1] == (ids.get("bos"),),
        add_eos=tokenizer.after[-1:] == (ids.get("eos"),),
        ends=found.ends,
        templates=tokenizer.templates,
    )


def write_vocabulary_file(file: Path, vocabulary: Vocabulary) -> None:
    """Write a GGUF file that holds a vocabulary and nothing else."""
    writer = GGUFWriter(file, "llama")
    add_name(writer, "", strips=vocabulary.strips)
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
    _add_special(writer, vocabulary.special)


def _add_special(writer: GGUFWriter, special: SpecialTokens) -> None:
    for role, number in special.ids.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(special.add_bos)
    writer.add_add_eos_token(special.add_eos)
    named = sorted(set(special.templates) - {DEFAULT})
    for name in named:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), special.templates[name])
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, named)
    if DEFAULT in special.templates:
        writer.add_chat_template(special.templates[DEFAULT])
