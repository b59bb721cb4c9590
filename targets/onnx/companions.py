"""The files next to a graph for text: tokenizer, chat templates and special tokens."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.foundation.errors import InputError
from exporter.model.ends import SpecialIds, special_ids
from exporter.model.model import Model
from exporter.model.tokenizer import ModelTokenizer, load_tokenizer
from exporter.model.tokenizer_files import TOKENIZER, to_text
from exporter.model.tokenizer_notes import DEFAULT
from exporter.targets.onnx.settings import CONFIGURATION, TOKEN_NAME, TOKENIZER_SETTINGS, TokenizerConfig
from exporter.targets.onnx.supported import context_length, runtime_type
from exporter.targets.onnx.tokenize import OTHER_TEMPLATES, TEMPLATE

# Without a pre-tokenizer, onnxruntime-genai splits a text as GPT-4 does; this one splits nothing.
WHOLE = {"type": "Split", "pattern": {"Regex": "[\\s\\S]+"}, "behavior": "Isolated", "invert": False}


def write_text_files(tokenizer: ModelTokenizer, context_length: int, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates.

    Args:
        tokenizer: The model's tokenizer.
        context_length: Length of the longest text in tokens.
        folder: Output folder.
    """
    (folder / TOKENIZER).write_text(to_text(_whole(tokenizer.definition)), encoding="utf-8")
    settings = TokenizerConfig(
        **_texts(tokenizer.names),
        clean_up_tokenization_spaces=False,
        model_max_length=context_length,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    (folder / TOKENIZER_SETTINGS).write_text(settings.to_text(), encoding="utf-8")
    for name, text in tokenizer.templates.items():
        if name != DEFAULT:
            (folder / OTHER_TEMPLATES).mkdir(exist_ok=True)
            (folder / OTHER_TEMPLATES / f"{name}.jinja").write_text(text, encoding="utf-8")
    if tokenizer.template is not None:
        (folder / TEMPLATE).write_text(tokenizer.template, encoding="utf-8")


def _texts(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: text for name, text in names.items() if isinstance(text, str) and re.search(TOKEN_NAME, name)}


def _whole(definition: dict[str, Any]) -> dict[str, Any]:
    """Return an equivalent tokenizer that onnxruntime-genai does not split by a pattern of its own."""
    never_cut = definition | {"truncation": None, "padding": None}
    return never_cut if definition.get("pre_tokenizer") else never_cut | {"pre_tokenizer": WHOLE}


def genai_ids(model: Model, tokenizer: ModelTokenizer) -> dict[str, Any]:
    """Return the ids of special tokens for genai_config.json.

    Without an end token, onnxruntime-genai ends at the padding token, or at token 0 if there is none either.
    """
    found = special_ids(model.folder, tokenizer.roles, model.decoder.vocab)
    ids: dict[str, Any] = {"eos_token_id": list(found.ends), "pad_token_id": _padding(found)}
    return ids | ({"bos_token_id": found.roles["bos"]} if "bos" in found.roles else {})


def _padding(found: SpecialIds) -> int:
    return found.roles.get("pad", found.ends[0] if found.ends else 0)


def write_text_alone(model: Model, folder: Path) -> None:
    """Write the files that onnxruntime-genai's tokenizer reads, without the graph.

    Raises:
        InputError: onnxruntime-genai has no tokenizer of this kind.
    """
    tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
    kind = tokenizer.definition["model"]["type"]
    if kind != "BPE":
        # It reads Unigram under the names of some classes, but without byte fallback and without BOS.
        raise InputError(
            "onnxruntime-genai has no such tokenizer", where=model.folder / tokenizer.source, got=kind, expected="BPE",
            next_step="use a model with a BPE tokenizer",
        )  # fmt: skip
    write_text_files(tokenizer, context_length(model), folder)
    facts = {"type": runtime_type(model.decoder), "vocab_size": model.decoder.vocab}
    facts |= {"context_length": context_length(model)}
    settings = {"model": facts | genai_ids(model, tokenizer)}
    (folder / CONFIGURATION).write_text(json.dumps(settings), encoding="utf-8")
