"""Chat template and end tokens of a fine-tune that is kept beside its base: keys of the adapter's file.

The base's file has those of the base, so that it is the same beside every adapter. llama.cpp reads neither from an
adapter: its own tools take a chat template from a file, and end a text as the base does.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from exporter.foundation.errors import InputError, RequestError
from exporter.model.gguf_ends import KEY, ends_read, ends_written
from exporter.model.gguf_reader import open_gguf
from exporter.model.lora import MERGE_INSTEAD
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.model.tokenizer_notes import DEFAULT
from exporter.targets.gguf.vocabulary import SpecialTokens, Vocabulary, read_vocabulary

TEMPLATE, EOS = gguf.Keys.Tokenizer.CHAT_TEMPLATE, gguf.Keys.Tokenizer.EOS_ID


@dataclass(frozen=True)
class AdapterText:
    """How a fine-tune treats text other than its base.

    Attributes:
        template: Its chat template; None for none.
        eos: Id of the end token that the template may write; None for none.
        ends: Ids at which a text ends.
    """

    template: str | None
    eos: int | None
    ends: tuple[int, ...]


def adapter_text(model: Model) -> AdapterText:
    """Return the text of a fine-tune that is kept beside its base.

    Args:
        model: Both merged, with `Model.base`.

    Raises:
        RequestError: it tokenises otherwise than its base.
    """
    assert model.base is not None
    own, base = _vocabulary(model), _vocabulary(model.base)
    if _without_text(own) != _without_text(base):
        raise RequestError(
            "the adapter's tokenizer is not that of the base, which is the only one in the base's file",
            where=model.name, expected="the same tokens, or no tokenizer beside the adapter", next_step=MERGE_INSTEAD,
        )  # fmt: skip
    return AdapterText(own.special.templates.get(DEFAULT), own.special.ids.get("eos"), own.special.ends)


def _vocabulary(model: Model) -> Vocabulary:
    rows = model.decoder.vocab
    return read_vocabulary(load_tokenizer(model.folder, rows), model.folder, rows)


def _without_text(vocabulary: Vocabulary) -> Vocabulary:
    """Return a vocabulary without the special tokens that change no ids of texts."""
    special = vocabulary.special
    ids = {role: number for role, number in special.ids.items() if role == "bos"}
    return replace(vocabulary, special=SpecialTokens(ids, special.add_bos, special.add_eos, (), {}))


def add_text(writer: gguf.GGUFWriter, text: AdapterText) -> None:
    """Add the keys of the text to the header of an adapter's file."""
    if text.template is not None:
        writer.add_chat_template(text.template)
    if text.eos is not None:
        writer.add_eos_token_id(text.eos)
    writer.add_string(KEY, ends_written(text.ends))


def read_adapter_text(path: Path) -> AdapterText | None:
    """Return the text of an adapter's file; None if that of the model counts.

    Raises:
        InputError: the file is damaged, or one of the keys has another type.
    """
    held = {name: field.contents() for name, field in open_gguf(path).fields.items() if name in (TEMPLATE, EOS, KEY)}
    if KEY not in held:
        return None
    template, eos, ends = held.get(TEMPLATE), held.get(EOS), held[KEY]
    if not (isinstance(template, str | None) and isinstance(eos, int | None) and isinstance(ends, str)):
        raise InputError(
            "the adapter's chat template or end tokens cannot be read", where=path,
            expected="a text, a number, and a text of numbers", next_step="get the bundle again",
        )  # fmt: skip
    return AdapterText(template, eos, tuple(ends_read(ends)))
