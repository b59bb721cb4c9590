"""A model's chat template as transformers renders it, in a child process: a template is a program of anybody's."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from exporter.child.process import Child
from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import JSON, kept
from exporter.foundation.errors import RuntimeCrashError
from exporter.model.chat import LOAD_S, TEXT_BYTES, Chat, Rendered, as_taken, render

if TYPE_CHECKING:  # the renderer's process does without its libraries
    from exporter.model.tokenizer import ModelTokenizer

# Raised when the same template gives another opening.
VERSION = 1
PROBE = "\u0001"
# What templates ask the clock for; a text that the model writes must be the same every day.
CLOCK = datetime(2024, 7, 26)


class TemplateRenderer:
    """A chat template in transformers, made to live in a `Child`.

    Args:
        template: The template.
        names: What it may know of the special tokens: name -> text.
        fixed_clock: Let the time stand still, in all of this process's templates.
    """

    title = "the chat template in transformers"

    def __init__(self, template: str | None, names: Mapping[str, Any], fixed_clock: bool) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import chat_template_utils

        self._template, self._names = template, dict(names)
        if fixed_clock:
            # Functions are not handed to a template; this one takes the time from here.
            module: Any = chat_template_utils
            module.datetime = SimpleNamespace(now=lambda: CLOCK)
        # The vocabulary does not matter.
        self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # type: ignore[no-untyped-call]

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Return a chat as transformers renders it; see `exporter.targets.text.TextRuntime`."""
        try:
            text = self._tokenizer.apply_chat_template(
                chat, chat_template=self._template, tokenize=False, add_generation_prompt=prompt, **self._names
            )
            return Rendered(str(text))
        except Exception as error:  # a template may end in any
            return Rendered.refused(error)


def open_renderer(tokenizer: "ModelTokenizer", fixed_clock: bool = False) -> Child:
    """Start a child that makes a `Renderer` by the tokenizer's template.

    Raises:
        RuntimeCrashError: it died.
    """
    child = Child(TemplateRenderer.title, TEXT_BYTES)
    try:
        child.make(TemplateRenderer, LOAD_S, tokenizer.template, tokenizer.names, fixed_clock)
        child.ready()
    except BaseException:
        child.close()
        raise
    return child


@dataclass(frozen=True)
class Opening:
    """How a chat opens by a template.

    Attributes:
        text: What comes before a user's first words; None where the template takes none of the probes.
        reason: Why it does not.
    """

    text: str | None
    reason: str = ""


def chat_opening(tokenizer: "ModelTokenizer") -> Opening:
    """Return how a chat opens by the tokenizer's template, found out once for each template and kept in the cache."""
    decisive = (VERSION, version("transformers"), tokenizer.template, tokenizer.names)
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
    path = cache_folder("templates") / f"{key}.json"
    return Opening(**kept(path, JSON, lambda: vars(_opening(tokenizer))))


def _opening(tokenizer: "ModelTokenizer") -> Opening:
    try:
        with open_renderer(tokenizer, fixed_clock=True) as child:
            taken = as_taken(lambda chat: render(child, chat, False), [{"role": "user", "content": PROBE}])
    except RuntimeCrashError as error:
        return Opening(None, str(error))
    text = taken.rendered.text
    if text is None:
        return Opening(None, taken.rendered.reason)
    return Opening(text.split(PROBE)[0]) if PROBE in text else Opening(None, "it leaves out what the user says")
