"""Renders a model's chat template with transformers in a child process, since a template is untrusted code."""

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

if TYPE_CHECKING:  # the renderer's process does not need its libraries
    from exporter.model.tokenizer import ModelTokenizer

# Increment when the same template gives another opening.
VERSION = 1
PROBE = "\u0001"
# Fixed time for templates, so that the text sampled from the model does not depend on the date.
CLOCK = datetime(2024, 7, 26)


class TemplateRenderer:
    """A chat template in transformers, for use in a `Child`.

    Args:
        template: The template.
        names: Special tokens available to the template: name -> text.
        fixed_clock: Fix the time for all templates of this process.
    """

    title = "the chat template in transformers"

    def __init__(self, template: str | None, names: Mapping[str, Any], fixed_clock: bool) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import chat_template_utils

        self._template, self._names = template, dict(names)
        if fixed_clock:
            # apply_chat_template takes no functions for a template, and reads the time from this module.
            module: Any = chat_template_utils
            module.datetime = SimpleNamespace(now=lambda: CLOCK)
        # The vocabulary does not matter.
        self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))  # type: ignore[no-untyped-call]

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Render a chat with transformers; see `exporter.targets.text.TextRuntime`."""
        try:
            text = self._tokenizer.apply_chat_template(
                chat, chat_template=self._template, tokenize=False, add_generation_prompt=prompt, **self._names
            )
            return Rendered(str(text))
        except Exception as error:  # a template may raise anything
            return Rendered.refused(error)


def open_renderer(tokenizer: "ModelTokenizer", fixed_clock: bool = False) -> Child:
    """Start a child with a `Renderer` for the tokenizer's template.

    Raises:
        RuntimeCrashError: the child died.
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
    """The opening of a chat in a template.

    Attributes:
        text: The text before the user's first words; None if the template accepts none of the probes.
        reason: Why it accepts none.
    """

    text: str | None
    reason: str = ""


def chat_opening(tokenizer: "ModelTokenizer") -> Opening:
    """Return the opening of a chat in the tokenizer's template, cached per template."""
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
