"""Calibration and evaluation texts: read, check, cut into windows of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from exporter.errors import InputError, RequestError

MAX_TEXT_BYTES = 256 << 20
Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """Windows of tokens with where they came from.

    Attributes:
        tokens: int64 [windows, length].
        kind: A user's file, or text that the model itself sampled.
        digest: SHA-256 of the tokens.
        source_bytes: Size of the text.
    """

    tokens: Tokens
    kind: Literal["file", "self-sampled"]
    digest: str
    source_bytes: int

    @classmethod
    def of(cls, tokens: Tokens, kind: Literal["file", "self-sampled"], source_bytes: int) -> "Windows":
        """Make windows and digest them."""
        tokens = np.ascontiguousarray(tokens, np.int64)
        return cls(tokens, kind, hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest(), source_bytes)

    def first(self, count: int) -> "Windows":
        """Return the first windows, or all where there are no more."""
        return Windows.of(self.tokens[:count], self.kind, self.source_bytes)


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


def file_windows(path: Path, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Windows:
    """Return the first `count` windows of a file's tokens, or as many as it holds (at least 4).

    Raises:
        InputError: the text is too short.
    """
    text = read_text(path)
    # Tokenising much more than is used wastes time: 16 characters a token is more than any text has.
    used = text[: count * length * 16]
    ids = tokenizer(used, add_special_tokens=False, verbose=False)["input_ids"]
    found = min(count, len(ids) // length)
    if found < 4:
        raise InputError(
            "the text is too short", where=path, got=f"{len(ids)} tokens", expected=f"at least {4 * length}"
        )
    tokens = np.array(ids[: found * length]).reshape(found, length)
    return Windows.of(tokens, "file", len(text.encode()))
