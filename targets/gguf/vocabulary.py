"""The vocabulary of a GGUF file: tokens, merges, special tokens, chat template, and a pre-tokenizer that is proven.

llama.cpp carries the pre-tokenizers of BPE models as code and picks one by name. Which name is right is not looked
up by a model's identity but found by trying: a name is taken when llama.cpp then gives the ids that transformers gives.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import GGUFValueType, GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from exporter.errors import InputError
from exporter.model.tensors import open_gguf
from exporter.model.tokenizer import (
    PARITY_CORPUS,
    PRE_TOKENIZERS,
    WHOLE_WORDS_FIRST,
    known_difference,
    load_tokenizer,
    parity_texts,
    pre_tokenizer,
)
from exporter.targets.gguf.tokenize import Case, Comparison, compare_in_child

# Names that llama.cpp knows besides those of PRE_TOKENIZERS, one for each way of splitting.
OTHER_PRE_TOKENIZERS = (
    "deepseek-v3", "deepseek-llm", "deepseek-coder", "qwen35", "minicpm5", "tiny_aya", "granite-embed-multi-97m",
    "falcon", "default", "bailingmoe", "seed-coder", "exaone-moe", "jais-2", "youtu", "spark2_5", "afmoe", "laguna",
    "chameleon", "superbpe", "ufakzeka", "poro-chat", "viking", "kimi-k2",
)  # fmt: skip
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


@dataclass(frozen=True)
class VocabularyProof:
    """What was shown about a written vocabulary.

    Attributes:
        pre_tokenizer: The name that gave equal ids.
        compared: Cases (a text with a way of handling special tokens); the ids of all were equal.
        set_apart: Texts not compared, since llama.cpp is known to treat them in another way: it does not normalise
            text for byte-level BPE, and puts a space before every part of a text where Metaspace does so once.
    """

    pre_tokenizer: str
    compared: int
    set_apart: int


def write_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int) -> VocabularyProof:
    """Add the vocabulary of a Hugging Face tokenizer to a GGUF file, after llama.cpp was shown to tokenise alike.

    Args:
        writer: Receives the keys `tokenizer.*`.
        folder: Holds the tokenizer.
        vocab_size: Rows of the embedding; ids that the tokenizer does not use become `[PADn]`.

    Raises:
        InputError: the tokenizer is of a kind that llama.cpp does not have, does not fit the embedding, or no
            pre-tokenizer of llama.cpp gives the same ids.
    """
    tokenizer = load_tokenizer(folder)
    vocabulary = read_vocabulary(tokenizer, folder, vocab_size)
    cases, set_apart = parity_cases(tokenizer, vocabulary.model)
    names = likely_pre_tokenizers(tokenizer) if vocabulary.model == "gpt2" else [vocabulary.pre_tokenizer]
    proven = prove(vocabulary, names, cases, folder)
    add_vocabulary(writer, replace(vocabulary, pre_tokenizer=proven))
    return VocabularyProof(proven, len(cases), set_apart)


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
    byte_level = any(part["type"] == "ByteLevel" for part in _parts(settings["pre_tokenizer"]))
    if model["type"] == "BPE" and (byte_level or model.get("byte_fallback")):
        return byte_level
    raise InputError(
        "llama.cpp has no such tokenizer",
        where=folder,
        got=f"{model['type']} with byte_level={byte_level} and byte_fallback={bool(model.get('byte_fallback'))}",
        expected="byte-level BPE, or BPE with byte fallback",
        next_step="lower the model to onnx instead",
    )


def _parts(section: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the components of a normaliser or pre-tokenizer, sequences flattened."""
    if section is None:
        return
    inner = section.get("pretokenizers", section.get("normalizers"))
    if inner is None:
        yield section
    for part in inner or ():
        yield from _parts(part)


def _prepends_space(settings: dict[str, Any]) -> bool:
    parts = [*_parts(settings["normalizer"]), *_parts(settings["pre_tokenizer"])]
    return any(part["type"] == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in parts)


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


def parity_cases(tokenizer: PreTrainedTokenizerBase, model: str) -> tuple[list[Case], int]:
    """Return what llama.cpp is asked, and the number of texts that it is known to treat in another way."""
    texts = parity_texts(tokenizer)
    apart = known_difference(tokenizer) if model == "gpt2" else _space_differs(tokenizer)
    alike = [text for text in texts if apart(text) is None]
    cases = [Case(text, True, True, tuple(tokenizer(text)["input_ids"])) for text in alike]
    if model == "gpt2":  # the other kind forms special tokens from plain text wherever their pieces are tokens
        cases += [Case(text, False, False, _plain_ids(tokenizer, text)) for text in alike]
    return cases, len(texts) - len(alike)


def _space_differs(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str | None]:
    """Return what says where a Metaspace tokenizer puts no space before a text but llama.cpp does."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    metaspace = any(part["type"] == "Metaspace" for part in _parts(settings["pre_tokenizer"]))
    added = tuple(token.content for token in tokenizer.added_tokens_decoder.values())

    def reason(text: str) -> str | None:
        differs = metaspace and (text.startswith((" ", "\u2581")) or any(token in text for token in added))
        return "llama.cpp puts a space before every part of a text" if differs else None

    return reason


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Return the ids of text that must not be able to name a special token."""
    return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def likely_pre_tokenizers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return llama.cpp's names, the likeliest first: those whose known form splits the corpus as the tokenizer does."""
    backend = tokenizer.backend_tokenizer
    whole_words = bool(backend.model.ignore_merges)
    own = [backend.pre_tokenizer.pre_tokenize_str(text) for text in PARITY_CORPUS]

    def unlikeness(name: str) -> tuple[int, bool]:
        form = pre_tokenizer(name)
        splits = [form.pre_tokenize_str(text) for text in PARITY_CORPUS]
        different = sum(a != b for a, b in zip(own, splits, strict=True))
        return different, (name in WHOLE_WORDS_FIRST) != whole_words

    return [*sorted(PRE_TOKENIZERS, key=unlikeness), *OTHER_PRE_TOKENIZERS]


def prove(vocabulary: Vocabulary, names: list[str], cases: list[Case], where: Path) -> str:
    """Return the first pre-tokenizer under which llama.cpp gives the expected ids in all cases.

    Raises:
        InputError: there is none.
    """
    tried: list[Comparison] = []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "vocabulary.gguf"
        write_vocabulary_file(file, vocabulary)
        for result in compare_in_child(file, names, cases):
            if result.different == 0:
                return str(result.pre_tokenizer)
            tried.append(result)
    raise _no_equal(tried, len(cases), where)


def _no_equal(tried: list[Comparison], cases: int, where: Path) -> InputError:
    best = min(tried, key=lambda result: cases + 1 if result.different is None else result.different)
    if best.example is None:
        return InputError(
            "llama.cpp loads this tokenizer under no pre-tokenizer",
            where=where,
            next_step="lower the model to onnx instead",
        )
    case, got = best.example
    return InputError(
        f"BPE pre-tokenizer was not recognized: under none of {len(tried)} does llama.cpp give this tokenizer's ids; "
        f"the best, {best.pre_tokenizer!r}, differs in {best.different} of {cases} cases, such as {case.text[:60]!r}",
        where=where,
        got=list(got[:16]),
        expected=list(case.ids[:16]),
        next_step="lower the model to onnx instead, or restore the tokenizer of the model it was made from",
    )


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
