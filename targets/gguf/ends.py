"""The tokens that end a text, in a key of our own: llama.cpp has three keys for them, and takes some texts for ends."""

import ctypes
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp

if TYPE_CHECKING:  # the runtime does without it
    from gguf import GGUFWriter

KEY = "edge_exporter.end_tokens"
ID = re.compile("[0-9]{1,9}")


def add_end_tokens(writer: "GGUFWriter", ends: Sequence[int]) -> None:
    """Add the ids of all tokens at which a text ends, as text: llama.cpp hands out no lists."""
    writer.add_string(KEY, ",".join(map(str, ends)))


def read_end_tokens(model: Any) -> frozenset[int] | None:
    """Return the ids at which a text ends, given llama.cpp's pointer to a model; None where the file says none."""
    size = llama_cpp.llama_model_meta_val_str(model, KEY.encode(), None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    llama_cpp.llama_model_meta_val_str(model, KEY.encode(), buffer, len(buffer))
    return frozenset(map(int, ID.findall(buffer.value.decode(errors="replace"))))
