"""Loads tokenizers from their own definition: tokenizer.json with tokenizers, tokenizer.model with SentencePiece.

A runtime has its own tokenizer, which is compared with the model's on texts. transformers may build another tokenizer
from the same files; the notes then say so.
"""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from exporter.child.process import Child
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.model.chat import LOAD_S
from exporter.model.corpus import PARITY_CORPUS
from exporter.model.sentencepiece_file import Pieces, as_definition, read_pieces
from exporter.model.tokenizer_files import (
    PIECES,
    SETTINGS,
    TOKENIZER,
    VOCABULARY,
    Added,
    TokenizerFiles,
    added_tokens,
    components,
    ids_of_vocabulary,
    is_id,
    model_type,
    read_tokenizer_files,
    readable,
    require_id,
    to_text,
    too_many_tokens,
    within_rows,
)
from exporter.model.tokenizer_notes import DEFAULT, TEMPLATE_NAME, different, not_held, on_templates, without_row

if TYPE_CHECKING:  # it imports torch, which a child that tries a tokenizer does not need
    from transformers import PreTrainedTokenizerBase

# Reading the largest known tokenizers, of 262,144 tokens, takes 1 GiB.
LOAD_BYTES = 2 << 30
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
ROLES = ("bos", "eos", "unk", "sep", "pad", "mask")
# Splitting rules before merging, from Hugging Face's tokenizer.json of the models that llama.cpp's names refer to.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(suffix: str, digits: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_words(r"\p{N}{1,3}"),),
    "smaug-bpe": (_words(r"\p{N}{1,3}"),),
    "qwen2": (_words(r"\p{N}"),),
    "gpt-4o": (_cased(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "tekken": (_cased("", r"\p{N}"),),
}
# Names whose models use a word that is in the vocabulary directly, without merges.
WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "tekken"})


@dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """The tokenizer of a model.

    Attributes:
        where: The folder it was read from.
        source: The file that defines it.
        definition: Content of a tokenizer.json, without tokens that have no row in the embedding.
        backend: The definition loaded by the tokenizers library.
        pieces: The SentencePiece model if it defines the ids; the definition is then converted from it.
        before: Ids prepended to a text.
        after: Ids appended to a text.
        roles: Role -> id of the special tokens that the tokenizer names.
        names: Special tokens available to a chat template: name -> text.
        special_ids: Ids of the special tokens.
        templates: Chat templates by name; the unnamed one is called `default`.
        notes: Notes for the report.
    """

    where: Path
    source: str
    definition: dict[str, Any]
    backend: Tokenizer
    pieces: Pieces | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    roles: Mapping[str, int]
    names: Mapping[str, Any]
    special_ids: frozenset[int]
    templates: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def template(self) -> str | None:
        """The default chat template."""
        return self.templates.get(DEFAULT)

    def ids(self, text: str) -> list[int]:
        """Return the model's input ids for a text, with BOS or EOS if the tokenizer adds them."""
        if self.pieces is not None:
            return [*self.before, *self.pieces.ids(text), *self.after]
        return list(self.backend.encode(text).ids)

    def inner_ids(self, text: str) -> list[int]:
        """Return the ids of a text without BOS and EOS; special tokens in it are recognised."""
        if self.pieces is not None:
            return self.pieces.ids(text)
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def literal_ids(self, text: str) -> list[int]:
        """Return the ids of an untrusted text without BOS and EOS; special tokens in it are not recognised."""
        if self.pieces is not None:
            return self.pieces.ids(text, special=False)
        self.backend.encode_special_tokens = True
        try:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        finally:
            self.backend.encode_special_tokens = False

    def ordinary_ids(self) -> list[int]:
        """Return the ids of the vocabulary without added or special tokens."""
        size = self.backend.get_vocab_size(with_added_tokens=False)
        return [number for number in range(size) if number not in self.special_ids]

    def added(self) -> dict[int, Any]:
        """Return id -> `AddedToken` of the tokens recognised in a text before it is tokenised."""
        return dict(self.backend.get_added_tokens_decoder())


@dataclass(frozen=True)
class _Defined:
    """The part of `ModelTokenizer` that the files define, and the texts of added tokens without a row."""

    source: str
    definition: dict[str, Any]
    backend: Tokenizer
    pieces: Pieces | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    left_out: tuple[str, ...]


def load_tokenizer(folder: Path, rows: int | None = None) -> ModelTokenizer:
    """Load the tokenizer of a Hugging Face folder; neither network nor code of the folder is used.

    Args:
        folder: The folder.
        rows: Rows of the embedding, None for any number; added tokens without a row are omitted.

    Raises:
        InputError: the folder holds no tokenizer, or the tokenizer is damaged, asks for remote code, or has more
            tokens in its vocabulary than rows.
    """
    files = read_tokenizer_files(folder)
    loaded = _by_transformers(folder)
    names = {name: value for name, value in loaded.special_tokens_map.items() if isinstance(value, str | list)}
    with readable("the tokenizer cannot be used", folder):
        if files.definition is None and (folder / PIECES).is_file():
            defined = _of_pieces(files, names, rows)
        elif files.definition is None:
            # Without tokenizer.json, transformers' code splits and normalises texts.
            built: Any = loaded.backend_tokenizer
            defined = _of_definition(VOCABULARY, json.loads(built.to_str()), (), folder, rows)
        else:
            extra = _named_in_vocabulary(files.definition, names) | dict(files.added)
            defined = _of_definition(TOKENIZER, files.definition, tuple(extra.values()), folder, rows)
        _require_ends(defined, rows, folder)
        templates = _templates(loaded, folder)
        made = _described(defined, names, templates, folder)
        texts = parity_texts(made)
        differing = [text for text in texts if list(loaded(text, verbose=False)["input_ids"]) != made.ids(text)]
    return replace(made, notes=(*made.notes, *different(made.source, type(loaded).__name__, texts, differing)))


def try_tokenizer(folder: Path) -> None:
    """Try an untrusted tokenizer in a child process before using it in this one.

    Raises:
        InputError: the tokenizer cannot be used, crashes its library, or takes too long.
    """
    with Child("the tokenizer", LOAD_BYTES) as child:
        try:
            child.run(use_tokenizer, LOAD_S, folder)
        except RuntimeCrashError as error:
            raise InputError("the tokenizer cannot be used", where=folder, got=error) from error


def use_tokenizer(folder: Path) -> None:
    """Use a tokenizer in this process.

    Raises:
        InputError: it cannot be used.
    """
    files = read_tokenizer_files(folder)
    with readable("the tokenizer cannot be used", folder):
        if files.definition is not None:
            library = _library(files.definition)
            for text in PARITY_CORPUS:
                library.encode(text)
        elif (folder / PIECES).is_file():
            pieces = read_pieces(folder / PIECES, {}, None)
            for text in PARITY_CORPUS:
                pieces.ids(text)


def _by_transformers(folder: Path) -> "PreTrainedTokenizerBase":
    """Return transformers' tokenizer for the files."""
    from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedTokenizerBase

    with readable("the tokenizer cannot be loaded", folder):
        # A tokenizer depends on nothing else in config.json.
        kind = model_type(folder)
        config = CONFIG_MAPPING[kind]() if kind is not None and kind in CONFIG_MAPPING else None
        loaded = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    if not isinstance(loaded, PreTrainedTokenizerBase) or getattr(loaded, "backend_tokenizer", None) is None:
        raise InputError(
            "the tokenizer has no fast form", where=folder, got=type(loaded).__name__, expected="a tokenizer.json"
        )
    return loaded


def _named_in_vocabulary(definition: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Added]:
    """Return the special tokens that the settings name and the vocabulary holds; these are recognised in texts."""
    ids = ids_of_vocabulary(definition)
    return {text: Added(ids[text], text) for text in _texts(names) if text in ids}


def _of_definition(
    source: str, definition: dict[str, Any], extra: tuple[Added, ...], folder: Path, rows: int | None
) -> _Defined:
    """Return the tokenizer of a tokenizer.json with the tokens that other files add."""
    known = {token["content"] for token in added_tokens(definition)}
    more = [vars(token) for token in extra if token.content not in known]
    listed = definition | {"added_tokens": [*added_tokens(definition), *more]}
    first: Any = _library(listed)
    # Add keys that a file may omit but readers expect.
    kind = type(first.model).__name__
    listed = dict.fromkeys(PARTS) | listed | {"model": {"type": kind} | definition["model"]}
    for token in more:
        require_id(token["content"], first.token_to_id(token["content"]), token["id"], folder / SETTINGS)
    # The library assigns ids to added tokens itself and ignores those in the file.
    counted = [token | {"id": first.token_to_id(token["content"])} for token in added_tokens(listed)]
    cut = within_rows(listed | {"added_tokens": counted}, rows, folder / source)
    backend = _library(cut.definition)
    for token in added_tokens(cut.definition):
        require_id(token["content"], backend.token_to_id(token["content"]), token["id"], folder / source)
    inner, whole = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next((i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner), 0)
    before, after = tuple(whole[:at]), tuple(whole[at + len(inner) :])
    return _Defined(source, cut.definition, backend, None, before, after, cut.left_out)


def _library(definition: dict[str, Any]) -> Tokenizer:
    """Load a tokenizer.json with the tokenizers library, without truncation or padding, as in transformers."""
    backend: Tokenizer = Tokenizer.from_str(to_text(definition | {"truncation": None, "padding": None}))
    return backend


def _of_pieces(files: TokenizerFiles, names: Mapping[str, Any], rows: int | None) -> _Defined:
    """Return the tokenizer of a tokenizer.model; only the settings decide whether BOS and EOS are added."""
    where = files.folder / PIECES
    every = read_pieces(where, {}, rows)
    ids = {text: number for number, text in enumerate(every.texts)}
    named = {text: Added(ids[text], text) for text in _texts(names) if text in ids}
    added = named | dict(files.added)
    within = {text: token for text, token in added.items() if is_id(token.id, rows)}
    pieces = replace(every, added=within)
    texts = [_added_around(role, files.settings, names) for role in ("bos", "eos")]
    definition = as_definition(pieces, texts[0], texts[1], where)
    before, after = (tuple(added[text].id for text in some) for some in texts)
    left_out = tuple(text for text in added if text not in within)
    return _Defined(PIECES, definition, _library(definition), pieces, before, after, left_out)


def _added_around(role: str, settings: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    text = names.get(f"{role}_token")
    return [text] if settings.get(f"add_{role}_token") is True and isinstance(text, str) else []


def _require_ends(defined: _Defined, rows: int | None, folder: Path) -> None:
    for number in (*defined.before, *defined.after):
        if not is_id(number, rows):
            raise too_many_tokens("which is put before or after every text", number, rows or 0, folder / defined.source)


def _texts(names: Mapping[str, Any]) -> list[str]:
    """Return the texts of all special tokens that a tokenizer names."""
    listed = (value if isinstance(value, list) else [value] for value in names.values())
    return [text for texts in listed for text in texts if isinstance(text, str) and text]


def _described(defined: _Defined, names: dict[str, Any], templates: dict[str, str], folder: Path) -> ModelTokenizer:
    find = defined.backend.token_to_id
    given = {role: names.get(f"{role}_token") for role in ROLES}
    roles = {role: find(text) for role, text in given.items() if isinstance(text, str)}
    missing = [text for text in _texts(names) if find(text) is None and text not in defined.left_out]
    special = {number for text in _texts(names) if (number := find(text)) is not None}
    return ModelTokenizer(
        where=folder,
        source=defined.source,
        definition=defined.definition,
        backend=defined.backend,
        pieces=defined.pieces,
        before=defined.before,
        after=defined.after,
        roles={role: number for role, number in roles.items() if number is not None},
        names=names,
        special_ids=frozenset(special) | (defined.pieces.special_ids if defined.pieces else frozenset()),
        templates={name: text for name, text in templates.items() if TEMPLATE_NAME.fullmatch(name)},
        notes=(*without_row(defined.left_out), *not_held(missing, defined.source), *on_templates(templates)),
    )


def _templates(loaded: "PreTrainedTokenizerBase", folder: Path) -> dict[str, str]:
    given: Any = loaded.chat_template
    named = {DEFAULT: given} if isinstance(given, str) else given or {}
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in (*named, *named.values())):
        raise InputError("the chat template is no text", where=folder / SETTINGS, got=type(given).__name__)
    return dict(named)


def parity_texts(tokenizer: ModelTokenizer) -> list[str]:
    """Return the corpus, random texts of its characters, and texts with the tokenizer's special and added tokens."""
    held = [text for text in _texts(tokenizer.names) if text and tokenizer.backend.token_to_id(text) is not None]
    added = [token.content for token in tokenizer.added().values() if token.content.strip()]
    texts = list(PARITY_CORPUS)
    for token in dict.fromkeys(held):
        texts += [token, f"{token}Hello", f"Hello{token}", f" {token} ", f"a {token}\n{token}{token} b", token[:-1]]
    texts += [f"x{token} y{token}z" for token in dict.fromkeys(added)]
    chance, characters = random.Random(0), "".join(PARITY_CORPUS)
    return texts + ["".join(chance.choices(characters, k=30)) for _ in range(64)]


def known_difference(tokenizer: ModelTokenizer) -> Callable[[str], str | None]:
    """Return a function that explains why a runtime must give a text other ids than the tokenizer, or gives None.

    Neither llama.cpp nor onnxruntime-genai normalises Unicode for BPE. Text that the tokenizer's normaliser would
    change (Qwen composes letters and accents) reaches the model unchanged. Replacing spaces does not count as a change.
    """
    if tokenizer.pieces is not None:
        return tokenizer.pieces.changes
    settings = tokenizer.definition.get("normalizer")
    changing = [part for part in components(settings) if not _writes_spaces(part)]
    if not changing:
        return lambda _: None
    bare = json.loads(Tokenizer(models.BPE()).to_str())
    normaliser: Any = _library(bare | {"normalizer": {"type": "Sequence", "normalizers": changing}}).normalizer
    kinds = ", ".join(part["type"] for part in changing)

    def reason(text: str) -> str | None:
        if normaliser.normalize_str(text) == text:
            return None
        return f"the tokenizer normalises such text ({kinds}), the runtime does not"

    return reason


def _writes_spaces(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a normaliser only marks spaces, which runtimes also do."""
    kind: str = part["type"]
    return kind == "Prepend" or (kind == "Replace" and part.get("pattern") == {"String": " "})


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return the Hugging Face form of the byte-level pre-tokenizer that llama.cpp calls `name`."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def token_ids(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """Return the model's input ids for a text, with BOS or EOS if the tokenizer adds them."""
    return tokenizer.ids(text)
