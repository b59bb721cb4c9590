"""Chat template and end tokens of a fine-tune that is kept beside its base: keys of the adapter's file.

The base's file has those of the base, so that it is the same beside every adapter. llama.cpp reads neither from an
adapter: its own tools take a chat template from a file, and end a text as the base does.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf

from exporter.foundation.errors import InputError
from exporter.model.gguf_ends import KEY, ends_read, ends_written
from exporter.model.gguf_reader import open_gguf

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
