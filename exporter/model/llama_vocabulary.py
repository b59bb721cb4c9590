"""What llama.cpp makes of the vocabulary of a GGUF file: the yardstick for the tokenizer of a source.

A bad vocabulary may abort the process: `SourceVocabulary` is made to live in a `Child`.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from exporter.foundation.errors import InputError

PRE_TOKENIZER_KEY = b"tokenizer.ggml.pre"


@dataclass(frozen=True)
class Case:
    """One text and its ids by the model's own tokenizer.

    Attributes:
        text: What is tokenised.
        add_special: Tokens such as BOS are added as the tokenizer does by itself.
        parse_special: The text of a special token counts as that token.
        ids: What the model's own tokenizer gives.
    """

    text: str
    add_special: bool
    parse_special: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """How one vocabulary did on all cases.

    Attributes:
        pre_tokenizer: The name tried, or None for what the file says.
        different: Number of cases whose ids differ; None if llama.cpp refused the vocabulary or died on it.
        example: The first case that differs, and the ids it got.
    """

    pre_tokenizer: str | None
    different: int | None
    example: tuple[Case, tuple[int, ...]] | None = None


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Swallow the log of llama.cpp: what it refuses is told by the result."""


@contextmanager
def open_vocabulary(path: Path, pre_tokenizer: str | None = None) -> Iterator[Any]:
    """Load only the vocabulary of a GGUF file; yields llama.cpp's pointer to the model without weights.

    Args:
        path: The file.
        pre_tokenizer: A name that takes the place of the file's `tokenizer.ggml.pre`.

    Raises:
        InputError: llama.cpp refuses the vocabulary.
    """
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    overrides: Any = (llama_cpp.llama_model_kv_override * 2)()  # the second, empty, ends the list
    if pre_tokenizer is not None:
        overrides[0].key = PRE_TOKENIZER_KEY
        overrides[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
        overrides[0].value.val_str = pre_tokenizer.encode()
        params.kv_overrides = overrides
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(
            "llama.cpp refuses the vocabulary",
            where=path,
            got=None if pre_tokenizer is None else f"the pre-tokenizer {pre_tokenizer!r}",
            next_step="write it again with write_vocabulary",
        )
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def llama_tokenize(model: Any, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
    """Return the ids that llama.cpp gives to a text.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        text: Any text.
        add_special: Add BOS and EOS as the vocabulary says.
        parse_special: Take the text of a special token for that token.
    """
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    data = text.encode()
    room = len(data) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, room, add_special, parse_special)
    return ids[:count]


def compare(model: Any, pre_tokenizer: str | None, cases: Sequence[Case]) -> Comparison:
    """Return how many cases llama.cpp gives other ids than they have.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        pre_tokenizer: The name that it was loaded under, or None for what the file says.
        cases: Texts and their ids.
    """
    different, example = 0, None
    for case in cases:
        flags = {"add_special": case.add_special, "parse_special": case.parse_special}
        got = tuple(llama_tokenize(model, case.text, **flags))
        if got != case.ids:
            different += 1
            example = example or (case, got)
    return Comparison(pre_tokenizer, different, example)


@dataclass(frozen=True)
class VocabularyFacts:
    """What llama.cpp does with a vocabulary that the file need not say.

    Attributes:
        attributes: Bits `LLAMA_TOKEN_ATTR_*` of every token, some of them given by the token's text.
        ends: Ids at which llama.cpp ends a text.
        adds_bos: BOS is put before a text.
        adds_eos: EOS is put after a text.
        bos: Id of BOS, or -1.
        eos: Id of EOS, or -1.
    """

    attributes: tuple[int, ...]
    ends: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    bos: int
    eos: int


class SourceVocabulary:
    """The vocabulary of a GGUF file as llama.cpp has it, made to live in a `Child`."""

    def __init__(self, path: Path) -> None:
        self._opened = open_vocabulary(path)
        self._model = self._opened.__enter__()
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def facts(self) -> VocabularyFacts:
        """Return what llama.cpp does with the vocabulary."""
        vocabulary = self._vocabulary
        ids = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
        return VocabularyFacts(
            attributes=tuple(int(llama_cpp.llama_vocab_get_attr(vocabulary, i)) for i in ids),
            ends=tuple(i for i in ids if llama_cpp.llama_vocab_is_eog(vocabulary, i)),
            adds_bos=bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
            adds_eos=bool(llama_cpp.llama_vocab_get_add_eos(vocabulary)),
            bos=int(llama_cpp.llama_vocab_bos(vocabulary)),
            eos=int(llama_cpp.llama_vocab_eos(vocabulary)),
        )

    def compare(self, cases: Sequence[Case]) -> Comparison:
        """Tokenise all cases and count those whose ids differ."""
        return compare(self._model, None, cases)
