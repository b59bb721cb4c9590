"""Builds the tokenizer of a GGUF file from the file's tokens, and checks that its ids equal llama.cpp's."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from exporter.child.process import Child
from exporter.foundation.errors import InputError, RuntimeCrashError, did_you_mean
from exporter.model.chat import LOAD_S, TEXT_BYTES
from exporter.model.gguf_ends import KEY, ends_read
from exporter.model.gguf_file import GgufFile
from exporter.model.llama_vocabulary import ROUGH_IN_CASE, Case, SourceVocabulary, VocabularyFacts
from exporter.model.tokenizer import PRE_TOKENIZERS, WHOLE_WORDS_FIRST, load_tokenizer, parity_texts

# Longer tokens are rejected: splitting a token into all pairs of parts takes time quadratic in its length.
TOKEN_CHARACTERS_MOST = 1024
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Bits of LLAMA_TOKEN_ATTR_*: unknown, control and user-defined tokens; stripping of spaces on the left and right.
UNKNOWN, CONTROL, USER_DEFINED, LSTRIP, RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8
HF_FOLDER = "give the model as a Hugging Face folder"

_GPT2 = PRE_TOKENIZERS["gpt-2"][0]
# llama.cpp's splitting rules for names that the exporter never writes.
OTHER_FORMS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "deepseek-coder": (
        r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}  # fmt: skip
# Name in a file -> a name that llama.cpp treats the same.
ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "exaone4", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "kormo"), "qwen2"),
    **dict.fromkeys(("dbrx", "chatglm-bpe"), "smaug-bpe"),
    **dict.fromkeys(("llama4", "kanana2"), "gpt-4o"),
}
FORMS = PRE_TOKENIZERS | OTHER_FORMS


@dataclass(frozen=True)
class FileVocabulary:
    """The tokenizer data in a GGUF file.

    Attributes:
        kind: `gpt2` is byte-level BPE, `llama` is BPE over SentencePiece's pieces.
        pre_tokenizer: Splitting rule applied before merging, a name in `FORMS`; for `gpt2`.
        tokens: Text of every token.
        merges: Pairs in order of rank.
        space_prefix: A space is prepended to a text; for `llama`.
        control: Ids of control tokens.
        special: Role -> id of the special tokens that the file names.
        template: The chat template, or several by name, or None.
    """

    kind: Literal["gpt2", "llama"]
    pre_tokenizer: str
    tokens: list[str]
    merges: list[tuple[str, str]]
    space_prefix: bool
    control: frozenset[int]
    special: dict[str, int]
    template: str | dict[str, str] | None


def unpack_tokenizer(file: GgufFile, rows: int, folder: Path) -> dict[str, Any]:
    """Write the tokenizer of a GGUF file into a folder, and check that its ids equal llama.cpp's.

    Args:
        file: The file.
        rows: Rows of the embedding.
        folder: Receives tokenizer.json, tokenizer_config.json and the chat template.

    Returns:
        Ids of special tokens, in the form of generation_config.json.

    Raises:
        InputError: the vocabulary is of another kind, is damaged, does not fit the embedding, or gives other ids than
            llama.cpp when rebuilt.
    """
    with Child("llama.cpp", TEXT_BYTES) as child:
        child.make(SourceVocabulary, LOAD_S, file.path)
        vocabulary = read_file_vocabulary(file, rows)
        try:
            facts = child.call(SourceVocabulary.facts, LOAD_S)
        except (InputError, RuntimeCrashError) as error:
            raise InputError(
                "llama.cpp cannot load the vocabulary", where=file.path, next_step="use a file that llama.cpp loads"
            ) from error
        _wrapped(vocabulary, facts, file.path).save_pretrained(folder)
        _require_equal(child, folder, vocabulary.pre_tokenizer, file.path)
    return _ends(vocabulary, facts, file.value(KEY))


def read_file_vocabulary(file: GgufFile, rows: int) -> FileVocabulary:
    """Read the keys `tokenizer.*`.

    Raises:
        InputError: see `unpack_tokenizer`.
    """
    kind, tokens = file.value("tokenizer.ggml.model"), _list(file, "tokens", str)
    if kind not in ("gpt2", "llama"):
        raise InputError(
            f"a tokenizer of kind {kind!r} is not supported", where=file.path,
            expected="'gpt2', byte-level BPE, or 'llama', BPE over SentencePiece's pieces", next_step=HF_FOLDER,
        )  # fmt: skip
    if len(tokens) != rows:
        raise InputError(
            "the tokens of the GGUF file do not fit the rows of its embedding", where=file.path, got=len(tokens),
            expected=rows, next_step="use a file that llama.cpp loads",
        )  # fmt: skip
    # llama.cpp substitutes this text for an empty token.
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        raise InputError("two tokens of the GGUF file share a text", where=file.path)
    prefix = file.value("tokenizer.ggml.add_space_prefix")
    types = file.value("tokenizer.ggml.token_type")
    types = types if isinstance(types, list) else []
    return FileVocabulary(
        kind=kind,
        pre_tokenizer=_pre_tokenizer(file) if kind == "gpt2" else "",
        tokens=tokens,
        merges=_merges(file) if kind == "gpt2" else _merges_by_score(file, tokens),
        space_prefix=kind == "llama" and prefix in (None, True),
        control=frozenset(i for i, kind in enumerate(types) if kind == TokenType.CONTROL),
        special=_special(file, len(tokens)),
        template=_template(file),
    )


def _list(file: GgufFile, key: str, kind: type | UnionType) -> list[Any]:
    values = file.value(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise InputError(
            f"the GGUF file holds no usable tokenizer.ggml.{key}", where=file.path, got=type(values).__name__,
            next_step="give the model with its tokenizer",
        )  # fmt: skip
    return values


def _pre_tokenizer(file: GgufFile) -> str:
    named = file.value("tokenizer.ggml.pre") or "default"
    name = ALIASES.get(named, named)
    if name not in FORMS:
        raise InputError(
            f"the pre-tokenizer {named!r} cannot be rebuilt from a GGUF file", where=file.path,
            next_step=f"{HF_FOLDER}, or one of these; {did_you_mean(str(named), [*FORMS, *ALIASES])}",
        )  # fmt: skip
    return name


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    """Return pairs in order of rank, split like llama.cpp at the first space after the first character."""
    pairs = [(text, text.find(" ", 1)) for text in _list(file, "merges", str)]
    return list(dict.fromkeys((text[:at], text[at + 1 :]) for text, at in pairs if at > 0))


def _merges_by_score(file: GgufFile, tokens: list[str]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that form a token, highest score first."""
    scores = _list(file, "scores", int | float)
    if len(scores) < len(tokens) or not all(math.isfinite(score) for score in scores):
        raise InputError("the GGUF file holds no usable tokenizer.ggml.scores", where=file.path, got=len(scores))
    longest = max(map(len, tokens))
    if longest > TOKEN_CHARACTERS_MOST:
        raise InputError(
            "a token of the GGUF file is too long", where=file.path, got=f"{longest} characters",
            expected=f"at most {TOKEN_CHARACTERS_MOST}",
        )  # fmt: skip
    held = set(tokens)
    ranked = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [pair for i in ranked for pair in _halves(tokens[i]) if pair[0] in held and pair[1] in held]


def _halves(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:at], token[at:]) for at in range(1, len(token)))


def _special(file: GgufFile, size: int) -> dict[str, int]:
    """Return role -> id; llama.cpp ignores ids outside the vocabulary."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    found = {role: file.value(f"tokenizer.ggml.{name}_token_id") for role, name in keys.items()}
    return {role: i for role, i in found.items() if isinstance(i, int) and 0 <= i < size}


def _template(file: GgufFile) -> str | dict[str, str] | None:
    """Return the file's chat template, or all of them by name if there are several."""
    default = file.value(TEMPLATE)
    named = {key.removeprefix(f"{TEMPLATE}."): file.value(key) for key in file.fields if key.startswith(f"{TEMPLATE}.")}
    found = {name: text for name, text in named.items() if TEMPLATE_NAME.fullmatch(name) and isinstance(text, str)}
    if not isinstance(default, str) or not default:
        return None
    return {"default": default, **found} if found else default


def _wrapped(vocabulary: FileVocabulary, facts: VocabularyFacts, where: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer for transformers; only tokens that llama.cpp treats as special are named as special."""
    tokens, attributes = vocabulary.tokens, facts.attributes
    ids = _known_special(vocabulary, facts)
    named = {
        f"{role}_token": tokens[ids[role]]
        for role in ("bos", "eos", "unk", "pad")
        if role in ids and attributes[ids[role]] & (CONTROL | UNKNOWN)
    }
    backend = build_backend(vocabulary, facts, where)
    settings: dict[str, Any] = {"tokenizer_object": backend, "clean_up_tokenization_spaces": False, **named}
    made = PreTrainedTokenizerFast(**settings)  # type: ignore[no-untyped-call]
    made.chat_template = vocabulary.template
    return made


def _known_special(vocabulary: FileVocabulary, facts: VocabularyFacts) -> dict[str, int]:
    """Return role -> id; for `llama`, llama.cpp's BOS and EOS are used if the file names none."""
    usual = {"bos": facts.bos, "eos": facts.eos} if vocabulary.kind == "llama" else {}
    return {role: i for role, i in usual.items() if i >= 0} | vocabulary.special


def build_backend(vocabulary: FileVocabulary, facts: VocabularyFacts, where: Path) -> Tokenizer:
    """Return a tokenizer that treats the vocabulary as llama.cpp does.

    Raises:
        InputError: merges and tokens do not match.
    """
    try:
        backend = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _pieces(vocabulary, facts)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise InputError("the merges do not fit the tokens", where=where, got=error, next_step=HF_FOLDER) from error
    special = UNKNOWN | CONTROL | USER_DEFINED
    added = [_added(vocabulary.tokens[i], bits) for i, bits in enumerate(facts.attributes) if bits & special]
    backend.add_tokens(added)
    backend.add_special_tokens([token for token in added if token.special])
    _add_ends(backend, vocabulary, facts)
    return backend


def _byte_level(vocabulary: FileVocabulary) -> Tokenizer:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    name = vocabulary.pre_tokenizer
    backend = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=name in WHOLE_WORDS_FIRST))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in FORMS[name]]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(vocabulary: FileVocabulary, facts: VocabularyFacts) -> Tokenizer:
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = next((i for i, bits in enumerate(facts.attributes) if bits & UNKNOWN), vocabulary.special.get("unk"))
    unk_token = None if unknown is None else vocabulary.tokens[unknown]
    backend = Tokenizer(models.BPE(ids, vocabulary.merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "\u2581")
    prefix = [normalizers.Prepend("\u2581")] if vocabulary.space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _added(text: str, bits: int) -> AddedToken:
    return AddedToken(
        text,
        lstrip=bool(bits & LSTRIP),
        rstrip=bool(bits & RSTRIP),
        normalized=False,
        special=bool(bits & (CONTROL | UNKNOWN)),
    )


def _add_ends(backend: Tokenizer, vocabulary: FileVocabulary, facts: VocabularyFacts) -> None:
    """Make the tokenizer add BOS and EOS wherever llama.cpp adds them."""
    begin = [(vocabulary.tokens[facts.bos], facts.bos)] if facts.adds_bos and facts.bos >= 0 else []
    end = [(vocabulary.tokens[facts.eos], facts.eos)] if facts.adds_eos and facts.eos >= 0 else []
    if begin or end:
        parts = [*(token for token, _ in begin), "$A", *(token for token, _ in end)]
        backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=[*{*begin, *end}])


def case_warning(file: GgufFile) -> tuple[str, ...]:
    """Return a warning if llama.cpp is known to split some texts differently from the model's own tokenizer."""
    name = file.value("tokenizer.ggml.pre")
    if name not in ROUGH_IN_CASE:
        return ()
    return (
        f"llama.cpp splits words with letters outside of ASCII only roughly under the pre-tokenizer {name!r}: some get "
        "other tokens in llama.cpp than the model was trained on",
    )


def _require_equal(child: Child, folder: Path, pre_tokenizer: str, where: Path) -> None:
    """Reject a tokenizer whose ids differ from llama.cpp's; known differences are exempt.

    Raises:
        InputError: see above.
    """
    # Uses the tokenizers library directly: transformers may substitute a class of the model family.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = parity_texts(load_tokenizer(folder))
    if pre_tokenizer in ROUGH_IN_CASE:
        texts = [text for text in texts if not any(sign.isalpha() and not sign.isascii() for sign in text)]
    cases = [Case(text, True, True, tuple(tokenizer.encode(text).ids)) for text in texts]
    found = child.call(SourceVocabulary.compare, LOAD_S, cases)
    if found.example is None:
        return
    case, by_llama_cpp = found.example
    raise InputError(
        f"the tokenizer of the GGUF file cannot be rebuilt: {found.different} of {len(cases)} texts get other ids than "
        f"by llama.cpp, such as {case.text[:60]!r}",
        where=where, got=list(case.ids[:16]), expected=list(by_llama_cpp[:16]), next_step=HF_FOLDER,
    )  # fmt: skip


def _ends(vocabulary: FileVocabulary, facts: VocabularyFacts, stated: object) -> dict[str, Any]:
    """Return ids of BOS and padding, and of all tokens that end a text.

    End tokens are those the file names, plus the control tokens that llama.cpp recognises by their text. A file that
    the exporter wrote lists them itself.
    """
    ids = _known_special(vocabulary, facts)
    own = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    found: dict[str, Any] = {f"{role}_token_id": ids[role] for role in ("bos", "pad") if role in ids}
    ends = list(dict.fromkeys([*own, *(i for i in facts.ends if i in vocabulary.control)]))
    if isinstance(stated, str):
        ends = [i for i in ends_read(stated) if i < len(vocabulary.tokens)]
    return found | ({"eos_token_id": ends} if ends else {})
