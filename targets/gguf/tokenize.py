"""How llama.cpp tokenises a text and how llama-cpp-python renders a chat.

A bad vocabulary may abort the process: `LlamaTokenizer` and `Comparer` are made to live in a `Child`.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from exporter.errors import InputError, RequestError, RuntimeCrashError
from exporter.targets.child import Child

Chat = list[dict[str, str]]  # not imported from exporter.model.tokenizer: a child need not load transformers
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


def llama_render_chat(model: Any, chat: Chat, prompt: bool) -> str | None:
    """Return a chat as llama-cpp-python renders it from the file's own template; None where the template refuses it.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        chat: Messages with `role` and `content`.
        prompt: Ask for the start of an answer at the end.

    Raises:
        RequestError: the file holds no chat template.
    """
    template = llama_cpp.llama_model_chat_template(model, None)
    if not template:
        raise RequestError("the GGUF file holds no chat template")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    bos = _token_text(vocabulary, llama_cpp.llama_vocab_bos(vocabulary))
    eos = _token_text(vocabulary, llama_cpp.llama_vocab_eos(vocabulary))
    formatter = Jinja2ChatFormatter(template.decode(), eos, bos, add_generation_prompt=prompt)
    try:
        return formatter(messages=chat).prompt  # type: ignore[arg-type]
    except (TemplateError, ValueError):  # a template's raise_exception becomes ValueError
        return None


def _token_text(vocabulary: Any, token: int) -> str:
    if token < 0:
        return ""
    text: bytes = llama_cpp.llama_vocab_get_text(vocabulary, token)
    return text.decode()


class LlamaTokenizer:
    """The tokenizer and chat template of a GGUF file, without its weights; serves a `Child`."""

    serves = True

    def __init__(self, path: Path) -> None:
        self._opened = open_vocabulary(path)
        self._model = self._opened.__enter__()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, with BOS or EOS where the file asks for them."""
        return llama_tokenize(self._model, text)

    def render(self, chat: Chat, prompt: bool) -> str | None:
        """Return a chat rendered by the file's template; see `llama_render_chat`."""
        return llama_render_chat(self._model, chat, prompt)


class Comparer:
    """Compares the vocabulary of one file, under several pre-tokenizers, with given ids; serves a `Child`."""

    serves = True

    def __init__(self, path: Path, cases: Sequence[Case]) -> None:
        self._path = path
        self._cases = cases

    def compare(self, pre_tokenizer: str | None) -> Comparison:
        """Tokenise all cases and count those whose ids differ."""
        with open_vocabulary(self._path, pre_tokenizer) as model:
            return compare(model, pre_tokenizer, self._cases)


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


def compare_in_child(path: Path, names: Sequence[str | None], cases: Sequence[Case]) -> Iterator[Comparison]:
    """Compare one pre-tokenizer after the other, and go on after one that llama.cpp refuses or dies on."""
    remaining = list(names)
    while remaining:
        with Child("llama.cpp", Comparer, path, cases) as child:
            while remaining:
                name = remaining.pop(0)
                try:
                    yield child.call("compare", name)
                except InputError:
                    yield Comparison(name, None)
                except RuntimeCrashError:
                    yield Comparison(name, None)
                    break
