"""Checks of tokenizer and chat template in a runtime: on a preview before a build, on the artifact after it."""

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from exporter.child.process import Child
from exporter.foundation.cache import cache_folder, scratch_folder
from exporter.foundation.cache_entries import JSON, kept
from exporter.foundation.errors import InputError, RuntimeCrashError
from exporter.foundation.quantities import Check, Document
from exporter.model.chat import LOAD_S, PARITY_CHATS, render
from exporter.model.ends import FILES as ENDS_FILES
from exporter.model.ends import special_ids
from exporter.model.known_differences import first_of, matching
from exporter.model.model import Model, digest_files, metadata_files
from exporter.model.template import open_renderer
from exporter.model.tokenizer import ModelTokenizer, known_difference, load_tokenizer, parity_texts, try_tokenizer
from exporter.prove.parity import check_chat_template, check_tokenizer
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Target
from exporter.targets.facts import facts_of
from exporter.targets.text import TextRuntime, open_text

# Raised when the same files would be judged differently.
VERSION = 3
# Packages that decide how a model handles text; each target names those of its runtime.
LIBRARIES = ("transformers", "tokenizers", "sentencepiece")


class TextPreview(Document):
    """A preview of an artifact's text handling before the artifact is made.

    Attributes:
        checks: Checks of tokenizer and chat template in the runtime.
        notes: Sentences that a reader of the results must know.
    """

    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def preview_text(model: Model, target: Target) -> TextPreview:
    """Return the preview of a model's text handling in a target's runtime; computed once per tokenizer and cached.

    Raises:
        InputError: the tokenizer cannot be used, the target does not support it, or its runtime gives a text other ids
            without a known reason.
    """
    path = cache_folder("texts") / f"{_key(model, target)}.json"

    def found() -> object:
        with scratch_folder() as scratch:
            return _preview(model, target, scratch).model_dump(mode="json")

    preview = TextPreview.model_validate_json(json.dumps(kept(path, JSON, found)))
    require_equal_ids(preview.checks, model.folder)
    return preview


def _key(model: Model, target: Target) -> str:
    """Return a digest of all that the answer depends on; of the model's configuration, only the special tokens."""
    found = [path for path in metadata_files(model.folder) if path.name not in ENDS_FILES]
    special = special_ids(model.folder, {}, model.decoder.vocab)
    kind, rows = model.decoder.family.model_type, model.decoder.vocab
    decisive = (VERSION, target.name, kind, rows, model.single_file is None, digest_files(found), special)
    libraries = (*LIBRARIES, *facts_of(target.name).text_libraries)
    return hashlib.sha256(repr((decisive, *map(_version, libraries))).encode()).hexdigest()[:32]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _preview(model: Model, target: Target, scratch: Path) -> TextPreview:
    if model.single_file is None:
        try_tokenizer(model.folder)
    artifact = target.lower_text(model, scratch)
    if artifact is None:
        return TextPreview()
    tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
    with _opened(artifact, model) as child:
        by_itself = child.call(TextRuntime.ends, LOAD_S)
        checks = check_text(child, tokenizer)
    special = special_ids(model.folder, tokenizer.roles, model.decoder.vocab)
    ends = _ends_notes(child.title, tokenizer, special.ends, by_itself)
    return TextPreview(checks=tuple(checks), notes=(*tokenizer.notes, *special.notes, *ends))


def _opened(artifact: Artifact, model: Model) -> Child:
    try:
        return open_text(artifact)
    except (InputError, RuntimeCrashError) as error:
        raise InputError(
            f"the runtime of the target {artifact.target} cannot load the tokenizer with its chat template",
            where=model.folder, got=str(error).replace(str(artifact.folder), "").lstrip("/: "),
            next_step="choose another target, or take the chat template away",
        ) from error  # fmt: skip


def _ends_notes(
    runtime: str, tokenizer: ModelTokenizer, ends: tuple[int, ...], by_itself: list[int]
) -> tuple[str, ...]:
    """Describe where a runtime itself ends a text or continues; `edge-exporter run` ends as the model does."""

    def named(ids: list[int]) -> str:
        return ", ".join(f"{tokenizer.backend.id_to_token(number)!r} ({number})" for number in ids[:8])

    missed, added = [n for n in ends if n not in by_itself], [n for n in by_itself if n not in ends]
    found = {
        f"{runtime} has no place for all tokens that end a text, and by itself goes on after": missed,
        f"{runtime} by itself ends a text also at tokens at which the model does not": added,
    }
    return tuple(
        f"{what}: {named(ids)}; edge-exporter run ends as the model does" for what, ids in found.items() if ids
    )


def check_text(child: Child, tokenizer: ModelTokenizer) -> list[Check]:
    """Compare tokenizer and chat template of an artifact, in a child of `open_text`, with the model's own."""
    runtime = child.title.lower().replace(" ", "-")
    texts = parity_texts(tokenizer)
    known = first_of(known_difference(tokenizer), matching(child.call(TextRuntime.known_differences, LOAD_S)))

    def ids(text: str) -> list[int]:
        return child.call(TextRuntime.tokenize, LOAD_S, text)

    checks = [check_tokenizer(texts, tokenizer.ids, ids, runtime, known)]
    if tokenizer.template is not None:
        checks.append(_check_template(child, tokenizer, tokenizer.template, runtime))
    return checks


def require_equal_ids(checks: Iterable[Check], where: object) -> None:
    """Refuse a runtime that gives a text other ids than the model's tokenizer, without a known reason.

    Raises:
        InputError: see above; it names the first such text.
    """
    for check in checks:
        if check.name.startswith("parity.tokenizer.") and check.status == "failed":
            raise InputError(
                "the target's runtime gives other ids than the model's tokenizer", where=where, got=check.detail,
                expected="equal ids, or a known reason for a difference",
                next_step="choose another target, or restore the tokenizer of the model it was made from",
            )  # fmt: skip


def _check_template(child: Child, tokenizer: ModelTokenizer, template: str, runtime: str) -> Check:
    with open_renderer(tokenizer) as own:
        return check_chat_template(
            PARITY_CHATS,
            lambda chat: render(own, chat, True),
            lambda chat: render(child, chat, True),
            runtime,
            clock="strftime_now" in template,
        )
