"""Reads untrusted tokenizer files within limits, and drops tokens without a row in the embedding."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.foundation.errors import InputError, RequestError
from exporter.model.json_file import MAX_BYTES, NEXT_STEP, read_json_object, read_json_object_if_there

TOKENIZER, SETTINGS, PIECES, VOCABULARY = "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"
ADDED = "added_tokens.json"
# Further files that transformers reads; each must be a JSON object if it exists.
OTHER_JSON = ("special_tokens_map.json", ADDED, VOCABULARY, "chat_template.json")
TEXTS = ("chat_template.jinja", "merges.txt", "additional_chat_templates/*.jinja")
TOGETHER = "check that tokenizer and weights belong together"


@dataclass(frozen=True)
class TokenizerFiles:
    """The content of a folder's tokenizer files.

    Attributes:
        folder: The folder.
        definition: Content of tokenizer.json; None if it does not exist.
        settings: Content of tokenizer_config.json; empty if it does not exist.
        added: Text -> id of the tokens that tokenizer_config.json and added_tokens.json add.
    """

    folder: Path
    definition: dict[str, Any] | None
    settings: Mapping[str, Any]
    added: Mapping[str, "Added"]


@dataclass(frozen=True)
class Added:
    """A token added to a vocabulary; the attributes are those of `tokenizers.AddedToken`."""

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer files of a folder.

    Raises:
        InputError: there are none, a file is damaged, or a file asks for remote code.
    """
    if not any((folder / name).is_file() for name in (TOKENIZER, PIECES, VOCABULARY)):
        raise InputError(
            "the folder holds no tokenizer", where=folder, expected=TOKENIZER,
            next_step="save it with AutoTokenizer.save_pretrained",
        )  # fmt: skip
    settings = read_json_object_if_there(folder / SETTINGS) or {}
    if "auto_map" in settings:
        raise InputError(
            "the tokenizer asks for remote code, which is never run", where=folder / SETTINGS, got="auto_map",
            expected="a tokenizer that transformers knows",
        )  # fmt: skip
    for name in OTHER_JSON:
        read_json_object_if_there(folder / name)
    for pattern in TEXTS:
        for path in folder.glob(pattern):
            _require_text(path)
    return TokenizerFiles(folder, read_json_object_if_there(folder / TOKENIZER), settings, _added(folder, settings))


def _require_text(path: Path) -> None:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path.name} is too large", where=path, expected=f"at most {MAX_BYTES} bytes")
        path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path.name} cannot be read", where=path, got=error.strerror) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not valid UTF-8", where=path, got=error, next_step=NEXT_STEP) from error


def _added(folder: Path, settings: Mapping[str, Any]) -> dict[str, Added]:
    listed = settings.get("added_tokens_decoder") or {}
    with readable("the added tokens cannot be read", folder / SETTINGS):
        found = [_added_token(int(number), token) for number, token in listed.items()]
    beside = read_json_object_if_there(folder / ADDED) or {}
    with readable("the added tokens cannot be read", folder / ADDED):
        known = {token.content for token in found}
        found += [_added_token(number, {"content": text}) for text, number in beside.items() if text not in known]
    return {token.content: token for token in sorted(found, key=lambda token: token.id)}


def _added_token(number: object, token: Mapping[str, Any]) -> Added:
    flags = {
        name: token[name] for name in ("special", "lstrip", "rstrip", "normalized", "single_word") if name in token
    }
    content = token["content"]
    if not is_id(number) or not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"no usable token: {token!r:.80}")
    assert isinstance(number, int)
    return Added(number, content, **flags)


def is_id(value: object, rows: int | None = None) -> bool:
    """Return whether a value is a token id: a non-negative integer, below `rows` if given."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (1 << 31 if rows is None else rows)


@contextmanager
def readable(what: str, where: object) -> Iterator[None]:
    """Turn any error of a library into an `InputError`; the tokenizers library panics on some files.

    Raises:
        InputError: see above.
    """
    try:
        yield
    except (InputError, RequestError):
        raise
    except BaseException as error:
        # A Rust panic is deliberately not an Exception.
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(what, where=where, got=reason, next_step=NEXT_STEP.replace("the file", "its files")) from error


@dataclass(frozen=True)
class Cut:
    """A definition without tokens that have no row in the embedding, and the texts of the omitted tokens."""

    definition: dict[str, Any]
    left_out: tuple[str, ...]


def within_rows(definition: dict[str, Any], rows: int | None, where: object) -> Cut:
    """Return the content of a tokenizer.json without the added tokens that have no row in the embedding.

    Args:
        definition: The content.
        rows: Rows of the embedding; None for any number.
        where: The file, for messages.

    Raises:
        InputError: a token of the vocabulary itself has no row.
    """
    if rows is None:
        return Cut(definition, ())
    added = added_tokens(definition)
    beyond = {token["content"] for token in added if not is_id(token["id"], rows)}
    model = definition["model"]
    held = ids_of_vocabulary(definition)
    _require_rows({text: number for text, number in held.items() if text not in beyond}, rows, where)
    if not beyond:
        return Cut(definition, ())
    whole = model["vocab"]
    kept = {text: number for text, number in held.items() if text not in beyond}
    cut = model | {"vocab": kept if isinstance(whole, dict) else whole[:rows]}
    left = [token for token in added if token["content"] not in beyond]
    return Cut(definition | {"model": cut, "added_tokens": left}, tuple(sorted(beyond)))


def added_tokens(definition: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of a tokenizer.json."""
    return list(definition.get("added_tokens") or ())


def ids_of_vocabulary(definition: Mapping[str, Any]) -> dict[str, int]:
    """Return text -> id of a tokenizer.json's vocabulary without added tokens; Unigram lists tokens with scores."""
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {entry[0]: number for number, entry in enumerate(vocabulary)}


def require_id(text: str, got: int | None, expected: int, where: object) -> None:
    """Reject an added token if the tokenizers library gives it another id.

    Raises:
        InputError: see above.
    """
    if got != expected:
        raise InputError(
            f"the added token {text!r:.60} cannot have its id", where=where, got=got, expected=expected,
            next_step="save the tokenizer again with AutoTokenizer.save_pretrained",
        )  # fmt: skip


def _require_rows(held: Mapping[str, Any], rows: int, where: object) -> None:
    text, number = max(held.items(), key=lambda one: int(one[1]), default=("", -1))
    if number >= rows:
        raise too_many_tokens(text, number, rows, where)


def too_many_tokens(text: str, number: int, rows: int, where: object) -> InputError:
    """Return the error for a token of the vocabulary that has no row."""
    return InputError(
        "the tokenizer has more tokens than the embedding has rows", where=where, got=f"id {number}, {text!r:.60}",
        expected=f"ids below {rows}", next_step=TOGETHER,
    )  # fmt: skip


def components(section: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the components of a normaliser or pre-tokenizer, with sequences flattened."""
    if section is None:
        return
    inner = section.get("pretokenizers", section.get("normalizers"))
    if inner is None:
        yield section
    for part in inner or ():
        yield from components(part)


def to_text(definition: Mapping[str, Any]) -> str:
    """Return the content of a tokenizer.json as the text of the file."""
    return json.dumps(definition, ensure_ascii=False)


def model_type(folder: Path) -> str | None:
    """Return `model_type` of config.json, which selects transformers' tokenizer class; None if absent."""
    config = folder / "config.json"
    kind = read_json_object(config).get("model_type") if config.is_file() else None
    return kind if isinstance(kind, str) else None
