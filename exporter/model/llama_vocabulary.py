"""Tokenises with llama.cpp and the vocabulary of a GGUF file, as the reference for a source's tokenizer.

A bad vocabulary may abort the process, so `SourceVocabulary` must run in a `Child`.
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
# Names of pre-tokenizers under which llama.cpp treats letters outside ASCII as both upper and lower case. The models'
# own tokenizers distinguish the cases.
ROUGH_IN_CASE = frozenset({"tekken", "gpt-4o", "llama4", "kanana2"})


@dataclass(frozen=True)
class Case:
    """One text and its ids from the model's own tokenizer.

    Attributes:
        text: The text.
        add_special: Add tokens such as BOS if the tokenizer does by default.
        parse_special: Parse the text of a special token as that token.
        ids: Ids from the model's own tokenizer.
    """

    text: str
    add_special: bool
    parse_special: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """The result of one vocabulary on all cases.

    Attributes:
        pre_tokenizer: The name tried, or None for the file's own.
        different: Number of cases whose ids differ; None if llama.cpp refused the vocabulary or crashed on it.
        example: The first case that differs, with its ids from llama.cpp.
        set_apart: Number of cases not compared, since llama.cpp is known to treat them differently.
    """

    pre_tokenizer: str | None
    different: int | None
    example: tuple[Case, tuple[int, ...]] | None = None
    set_apart: int = 0


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Discard llama.cpp's log; failures show in return values."""


@contextmanager
def open_vocabulary(path: Path, pre_tokenizer: str | None = None) -> Iterator[Any]:
    """Load only the vocabulary of a GGUF file; yields llama.cpp's pointer to the model without weights.

    Args:
        path: The file.
        pre_tokenizer: A name that replaces the file's `tokenizer.ggml.pre`.

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
    """Return llama.cpp's ids for a text.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        text: Any text.
        add_special: Add BOS and EOS if the vocabulary says so.
        parse_special: Parse the text of a special token as that token.
    """
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    data = text.encode()
    room = len(data) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, room, add_special, parse_special)
    return ids[:count]


def compare(model: Any, pre_tokenizer: str | None, cases: Sequence[Case]) -> Comparison:
    """Count the cases for which llama.cpp gives different ids.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        pre_tokenizer: The name it was loaded with, or None for the file's own.
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
    """Properties of a vocabulary in llama.cpp that the file need not state.

    Attributes:
        attributes: Bits `LLAMA_TOKEN_ATTR_*` of every token; some follow from the token's text.
        ends: Ids at which llama.cpp ends a text.
        adds_bos: BOS is prepended to a text.
        adds_eos: EOS is appended to a text.
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
    """The vocabulary of a GGUF file in llama.cpp, for use in a `Child`."""

    def __init__(self, path: Path) -> None:
        self._opened = open_vocabulary(path)
        self._model = self._opened.__enter__()
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)

    def facts(self) -> VocabularyFacts:
        """Return the properties of the vocabulary in llama.cpp."""
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
