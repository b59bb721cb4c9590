"""Tokenisation by llama.cpp and chat rendering by llama-cpp-python.

A bad vocabulary may abort the process, so `LlamaTokenizer` and `Comparer` run in a `Child`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from exporter.child.process import Child
from exporter.foundation.errors import InputError, RequestError, RuntimeCrashError
from exporter.model.chat import LOAD_S, TEXT_BYTES, Chat, Rendered
from exporter.model.known_differences import matching
from exporter.model.llama_vocabulary import Case, Comparison, compare, llama_tokenize, open_vocabulary
from exporter.targets.gguf.text_differences import by_pre_tokenizer, by_vocabulary


def llama_render_chat(model: Any, chat: Chat, prompt: bool) -> Rendered:
    """Return a chat as llama-cpp-python renders it from the file's own template.

    Args:
        model: llama.cpp's pointer to a model, with or without weights.
        chat: Messages with `role` and `content`.
        prompt: End with the start of an answer.

    Raises:
        RequestError: the file holds no chat template.
    """
    template = llama_cpp.llama_model_chat_template(model, None)
    eos = llama_cpp.llama_vocab_eos(llama_cpp.llama_model_get_vocab(model))
    return render_with(template.decode() if template else None, eos, model, chat, prompt)


def render_with(template: str | None, eos: int | None, model: Any, chat: Chat, prompt: bool) -> Rendered:
    """Return a chat as llama-cpp-python renders it from a template and an end token; see `llama_render_chat`."""
    if not template:
        raise RequestError("the GGUF file holds no chat template")
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    bos = _token_text(vocabulary, llama_cpp.llama_vocab_bos(vocabulary))
    end = _token_text(vocabulary, -1 if eos is None else eos)
    try:
        formatter = Jinja2ChatFormatter(template, end, bos, add_generation_prompt=prompt)
        return Rendered(formatter(messages=chat).prompt)  # type: ignore[arg-type]
    except Exception as error:  # a template may raise any exception
        return Rendered.refused(error)


def _token_text(vocabulary: Any, token: int) -> str:
    if not 0 <= token < llama_cpp.llama_vocab_n_tokens(vocabulary):
        return ""
    text: bytes = llama_cpp.llama_vocab_get_text(vocabulary, token)
    return text.decode(errors="replace")


class LlamaTokenizer:
    """The tokenizer and chat template of a GGUF file, without its weights."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = open_vocabulary(path)
        self._model = self._opened.__enter__()

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with BOS or EOS if the file asks for them."""
        return llama_tokenize(self._model, text)

    def known_differences(self, special: bool = True) -> dict[str, str]:
        """Return pattern -> reason of texts that get other ids than by the tokenizer; see `by_vocabulary`."""
        return by_vocabulary(self._path, self._model, special=special)

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Return a chat rendered by the file's template; see `llama_render_chat`."""
        return llama_render_chat(self._model, chat, prompt)

    def ends(self) -> list[int]:
        """Return the ids at which llama.cpp ends a text: those in the file's keys and those whose text it knows."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        ids = range(llama_cpp.llama_vocab_n_tokens(vocabulary))
        return [token for token in ids if llama_cpp.llama_vocab_is_eog(vocabulary, token)]


class Comparer:
    """Compares the ids that one file's vocabulary gives, under several pre-tokenizers, with expected ids."""

    def __init__(self, path: Path, cases: Sequence[Case]) -> None:
        self._path = path
        self._cases = cases

    def compare(self, pre_tokenizer: str | None) -> Comparison:
        """Tokenise all cases and count those whose ids differ."""
        rough = matching(by_pre_tokenizer(pre_tokenizer))
        cases = [case for case in self._cases if not rough(case.text)]
        with open_vocabulary(self._path, pre_tokenizer) as model:
            return replace(compare(model, pre_tokenizer, cases), set_apart=len(self._cases) - len(cases))


def compare_in_child(path: Path, names: Sequence[str | None], cases: Sequence[Case]) -> Iterator[Comparison]:
    """Compare one pre-tokenizer after the other; continue after one that llama.cpp refuses or crashes on."""
    remaining = list(names)
    while remaining:
        with Child("llama.cpp", TEXT_BYTES) as child:
            child.make(Comparer, LOAD_S, path, cases)
            while remaining:
                name = remaining.pop(0)
                try:
                    yield child.call(Comparer.compare, LOAD_S, name)
                except InputError:
                    yield Comparison(name, None)
                except RuntimeCrashError:
                    yield Comparison(name, None)
                    break
