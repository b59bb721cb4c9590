"""Calibration and evaluation texts: reads and checks them, and cuts them into windows of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exporter.foundation.errors import InputError, RequestError
from exporter.model.tokenizer import ModelTokenizer

MAX_TEXT_BYTES = 256 << 20
LEAST_WINDOWS = 4
# More than the average of any text; limits how much text is tokenised.
CHARACTERS_A_TOKEN = 16
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Windows of tokens and their origin.

    Attributes:
        tokens: int64 [windows, length].
        kind: A user's file, or text sampled from the model itself.
        digest: SHA-256 of the tokens.
        source_bytes: Size of the text.
    """

    tokens: Tokens
    kind: Literal["file", "self-sampled"]
    digest: str
    source_bytes: int

    @classmethod
    def of(cls, tokens: Tokens, kind: Literal["file", "self-sampled"], source_bytes: int) -> "Windows":
        """Make windows with their digest."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        return cls(tokens, kind, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(), source_bytes)

    def spread(self, count: int) -> "Windows":
        """Return `count` evenly spaced windows, or all if there are fewer."""
        return Windows.of(self.tokens[_evenly(len(self.tokens), count)], self.kind, self.source_bytes)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        RequestError: there is no such file, or it is larger than 256 MiB.
        InputError: the file is not UTF-8.
    """
    if not path.is_file():
        raise RequestError("there is no such text file", where=path, next_step="check the path")
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise RequestError("the text file is too large", where=path, got=path.stat().st_size, expected=MAX_TEXT_BYTES)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            "the text is not UTF-8", where=path, got=f"byte {error.start}: {error.reason}", next_step="convert it"
        ) from error


def file_windows(path: Path, tokenizer: ModelTokenizer, count: int, length: int) -> Windows:
    """Return the first `count` windows of a file's tokens, or as many as it holds (at least 4).

    Raises:
        RequestError, InputError: see `read_text`; or the text is too short.
    """
    text = read_text(path)
    found = _windows(text[: count * length * CHARACTERS_A_TOKEN], tokenizer, length)
    return _checked(found[:count], text, path, tokenizer)


def spread_windows(path: Path, tokenizer: ModelTokenizer, count: int, length: int) -> Windows:
    """Return `count` windows spread over a file, in order, or as many as it holds (at least 4).

    Fitting to them generalises better than fitting to as many from the beginning.

    Raises:
        RequestError, InputError: see `read_text`; or the text is too short.
    """
    text = read_text(path)
    characters = length * CHARACTERS_A_TOKEN
    if len(text) <= count * characters:
        found = _windows(text, tokenizer, length)
    else:
        starts = [part * len(text) // count for part in range(count)]
        parts = [_windows(text[start : start + characters], tokenizer, length) for start in starts]
        found = np.concatenate([part[:1] for part in parts])
    return _checked(found[_evenly(len(found), count)], text, path, tokenizer)


def _evenly(total: int, count: int) -> slice | NDArray[np.intp]:
    """Return `count` evenly spaced indices below `total`, or all if there are fewer."""
    return slice(None) if total <= count else np.arange(count) * total // count


def _windows(text: str, tokenizer: ModelTokenizer, length: int) -> Tokens:
    """Return the complete windows of a text, int64 [windows, length]."""
    ids = tokenizer.inner_ids(text)
    found = len(ids) // length
    return np.array(ids[: found * length], np.int64).reshape(found, length)


def _checked(found: Tokens, text: str, path: Path, tokenizer: ModelTokenizer) -> Windows:
    count, length = found.shape
    if count < LEAST_WINDOWS:
        beginning = text[: LEAST_WINDOWS * length * CHARACTERS_A_TOKEN]
        tokens = len(tokenizer.inner_ids(beginning))
        raise InputError(
            "the text is too short", where=path, got=f"{tokens} tokens", expected=f"at least {LEAST_WINDOWS * length}"
        )
    return Windows.of(found, "file", len(text.encode()))
