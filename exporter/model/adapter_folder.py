"""The config and tokenizer of a merged model: a folder of the cache with files of the base and of the adapter.

A tokenizer is taken whole from one of the two folders, since its files refer to each other. The adapter's comes first,
with its chat template or without one; an adapter may also bring a chat template alone. generation_config.json, which
names end tokens, is the adapter's if it holds one.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import kept_folder
from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError
from exporter.model.config import CONFIG
from exporter.model.json_file import read_json_object_if_there
from exporter.model.licences import licence_files
from exporter.model.model import digest_files, metadata_files
from exporter.model.tokenizer_files import (
    ADDED,
    PIECES,
    SETTINGS,
    TOKENIZER,
    VOCABULARY,
    added_tokens,
    is_id,
    read_tokenizer_files,
    readable,
)

# Increment when the same files give another folder.
VERSION = 1
GENERATION = "generation_config.json"
DEFINITIONS = (TOKENIZER, PIECES, VOCABULARY)
# JSON files of a tokenizer; of other kinds, all that `metadata_files` lists are a tokenizer's or a template's.
TOKENIZER_JSON = (TOKENIZER, SETTINGS, VOCABULARY, ADDED, "special_tokens_map.json", "chat_template.json")


def adapted_folder(base: Path, adapter: Path, config: Mapping[str, Any]) -> Path:
    """Return a folder with the config and tokenizer of a base with an adapter.

    Args:
        base: The base's folder.
        adapter: The adapter's folder.
        config: The content of config.json.

    Raises:
        InputError: the adapter's folder holds only a part of a tokenizer, or a tokenizer with tokens that were added to
            the base's and have no row in the embedding.
    """
    _require_rows(base, adapter, config["vocab_size"])
    files = _files(base, adapter)
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    named = "".join(f"{name}:{digest_files([path])}\n" for name, path in sorted(files.items()))
    digest = hashlib.sha256(f"{content}{named}".encode()).hexdigest()[:32]

    def make(folder: Path) -> None:
        for name, path in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)
        (folder / CONFIG).write_text(content, encoding="utf-8")

    return kept_folder(cache_folder("adapted") / f"{VERSION}-{digest}", make)


def tokenizer_note(base: Path, adapter: Path) -> str:
    """Return a sentence for the report on whose tokenizer and chat template a merged model has."""
    if not _has_tokenizer(adapter):
        own = " with the adapter's chat template" if _has_template(adapter) else ""
        return f"the tokenizer is the base's{own}"
    lost = _has_template(base) and not _has_template(adapter)
    return f"the tokenizer is the adapter's{', which has no chat template although the base has one' if lost else ''}"


def _has_template(folder: Path) -> bool:
    settings = read_json_object_if_there(folder / SETTINGS) or {}
    return bool(settings.get("chat_template")) or any(name.endswith(".jinja") for name in _of_tokenizer(folder))


def _require_rows(base: Path, adapter: Path, rows: int) -> None:
    if not _has_tokenizer(adapter):
        return
    known = _added_beyond(base, rows) if _has_tokenizer(base) else set()
    added = _added_beyond(adapter, rows) - known
    if added:
        raise InputError(
            "the adapter's tokenizer has tokens that neither the base nor the adapter has embeddings for",
            where=adapter, got=", ".join(map(shown, sorted(added)[:4])), expected=f"ids below {rows}",
            next_step="save the adapter with save_embedding_layers=True, or the tokenizer without these tokens",
        )  # fmt: skip


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in DEFINITIONS)


def _added_beyond(folder: Path, rows: int) -> set[str]:
    """Return the texts of the added tokens that have no row."""
    files = read_tokenizer_files(folder)
    with readable("the added tokens cannot be read", folder / TOKENIZER):
        listed = {token["content"]: token["id"] for token in added_tokens(files.definition or {})}
        return {
            text for text, number in [*listed.items(), *((one.content, one.id) for one in files.added.values())]
            if not is_id(number, rows)
        }  # fmt: skip


def _files(base: Path, adapter: Path) -> dict[str, Path]:
    """Return relative name -> file, of all files but config.json."""
    own, brought = _of_tokenizer(base), _of_tokenizer(adapter)
    templates = {name: path for name, path in brought.items() if name.endswith(".jinja")}
    if _has_tokenizer(adapter):
        own = brought
    elif brought.keys() - templates.keys():
        raise InputError(
            "the adapter's folder holds a part of a tokenizer", where=adapter,
            got=", ".join(sorted(brought.keys() - templates.keys())), expected="a whole one, or none",
            next_step="save it there with AutoTokenizer.save_pretrained, or remove these files",
        )  # fmt: skip
    elif templates:
        own = {name: path for name, path in own.items() if not name.endswith(".jinja")} | templates
    generation = next((folder / GENERATION for folder in (adapter, base) if (folder / GENERATION).is_file()), None)
    licences = {path.name: path for path in licence_files(base)}
    return own | licences | ({} if generation is None else {GENERATION: generation})


def _of_tokenizer(folder: Path) -> dict[str, Path]:
    """Return relative name -> file, of the files of a folder's tokenizer and chat templates."""
    found = {str(path.relative_to(folder)): path for path in metadata_files(folder)}
    return {name: path for name, path in found.items() if name in TOKENIZER_JSON or not name.endswith(".json")}
