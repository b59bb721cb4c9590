"""The end-of-text tokens of a loaded GGUF file, read from a key that only this exporter writes."""

import ctypes
from typing import Any

import llama_cpp

from exporter.model.gguf_ends import KEY, ends_read


def read_end_tokens(model: Any) -> frozenset[int] | None:
    """Return the end-of-text ids, given llama.cpp's pointer to a model; None if the file states none."""
    key = KEY.encode()
    size = llama_cpp.llama_model_meta_val_str(model, key, None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    llama_cpp.llama_model_meta_val_str(model, key, buffer, len(buffer))
    return frozenset(ends_read(buffer.value.decode(errors="replace")))
