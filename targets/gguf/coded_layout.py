"""The layout of GGUF files for coding: the fields of the blocks of ggml's types."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from exporter.coding.layout import CODES, NUMBERS, Field, FileSection, Part
from exporter.model.gguf_reader import open_gguf

_HALF, _FLOAT = Field(NUMBERS, 2), Field(NUMBERS, 4)


def _codes(*widths: int) -> tuple[Field, ...]:
    return tuple(Field(CODES, width) for width in widths)


# Blocks of ggml's types (ggml-common.h): float16 scales, nested scales, and codes of one or several widths.
_BLOCKS: dict[str, tuple[Field, ...]] = {
    "F32": (_FLOAT,),
    "F16": (_HALF,),
    "BF16": (_HALF,),
    "Q4_0": (_HALF, *_codes(16)),
    "Q4_1": (_HALF, _HALF, *_codes(16)),
    "Q5_0": (_HALF, *_codes(4, 16)),
    "Q5_1": (_HALF, _HALF, *_codes(4, 16)),
    "Q8_0": (_HALF, *_codes(32)),
    "Q2_K": (*_codes(16, 64), _HALF, _HALF),
    "Q3_K": (*_codes(32, 64, 12), _HALF),
    "Q4_K": (_HALF, _HALF, *_codes(12, 128)),
    "Q5_K": (_HALF, _HALF, *_codes(12, 32, 128)),
    "Q6_K": (*_codes(128, 64, 16), _HALF),
    "IQ4_NL": (_HALF, *_codes(16)),
    "IQ4_XS": (_HALF, *_codes(2, 4, 128)),
}


def layout_of(path: Path) -> list[FileSection] | None:
    """Return the tensors of a GGUF file; None for another file.

    Raises:
        InputError: the file cannot be read.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        return None
    return [
        FileSection(int(tensor.data_offset), _ggml_part(tensor.tensor_type, [int(n) for n in tensor.shape]))
        for tensor in open_gguf(path).tensors
    ]


def _ggml_part(type: gguf.GGMLQuantizationType, shape: Sequence[int]) -> Part:
    """Return the part for a tensor; ggml's shapes begin with the columns."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    fields = _BLOCKS.get(type.name, (Field(CODES, size),))
    assert sum(field.width for field in fields) == size
    return Part(int(np.prod(shape[1:], dtype=np.int64)), shape[0] // block, fields)
