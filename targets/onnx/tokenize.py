"""Tokenisation and chat rendering by onnxruntime-genai, from a model folder without weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from exporter.foundation.errors import InputError, RequestError
from exporter.model.chat import Chat, Rendered
from exporter.targets.onnx.text_differences import known_differences

TEMPLATE, OTHER_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


class GenaiTokenizer:
    """The tokenizer and chat template of a folder for onnxruntime-genai; it runs in a `Child`.

    Args:
        folder: Holds genai_config.json, tokenizer.json and tokenizer_config.json; the ONNX graph is not read.

    Raises:
        InputError: onnxruntime-genai cannot read the tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._tokenizer = onnxruntime_genai.Tokenizer(str(folder))
            # The default omits BOS and EOS even if tokenizer.json adds them; where it adds none, this would add one.
            if self._adds_tokens():
                self._tokenizer.update_options(add_special_tokens="true")
        except RuntimeError as error:
            raise InputError(
                "onnxruntime-genai cannot read the tokenizer",
                where=folder,
                got=" ".join(str(error).split())[:300],
                next_step="save the tokenizer again with AutoTokenizer.save_pretrained",
            ) from error

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with BOS or EOS if the tokenizer adds them."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def known_differences(self) -> dict[str, str]:
        """Return pattern -> reason of texts that get other ids than by tokenizer.json."""
        return known_differences(self._folder)

    def text(self, ids: list[int]) -> str:
        """Return the text of ids, without special tokens."""
        return str(self._tokenizer.decode(np.array(ids, np.int32)))

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Return a chat rendered by the folder's template.

        Args:
            chat: Messages with `role` and `content`.
            prompt: End with the start of an answer.

        Raises:
            RequestError: the folder holds no chat template.
        """
        if not self._has_template():
            raise RequestError("the folder holds no chat template", where=self._folder)
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=prompt)
            return Rendered(str(text))
        except Exception as error:  # a template may raise any exception
            return Rendered.refused(error)

    def ends(self) -> list[int]:
        """Return the ids at which onnxruntime-genai ends a text; without any, it ends at the padding token."""
        settings = json.loads((self._folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = settings["eos_token_id"]
        return (list(ends) if isinstance(ends, list) else [ends]) or [settings["pad_token_id"]]

    def _adds_tokens(self) -> bool:
        """Return whether tokenizer.json adds tokens to a text."""
        content = json.loads((self._folder / "tokenizer.json").read_text(encoding="utf-8"))
        return _adds_tokens(content.get("post_processor"))

    def _has_template(self) -> bool:
        settings = self._folder / "tokenizer_config.json"
        if (self._folder / TEMPLATE).is_file():
            return True
        return settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))


def _adds_tokens(processor: dict[str, Any] | None) -> bool:
    """Return whether a post-processor of tokenizer.json adds tokens to a text."""
    if processor is None or processor["type"] == "ByteLevel":
        return False
    if processor["type"] == "Sequence":
        return any(_adds_tokens(one) for one in processor["processors"])
    # Of the other kinds, templates alone may add none.
    return processor["type"] != "TemplateProcessing" or bool(processor["special_tokens"])
