"""The layout of a runtime's file for coding: which bytes are codes and which are numbers.

A part of a file is an array [rows, records] of records of equal size. A record is a sequence of fields, such as the
float16 scale and the 32 codes of a Q8_0 block. Bytes of one kind are similar, so each field is coded separately. A
wrong layout costs bytes, never correctness. Which parts a file has is said by the target that wrote it; see
`exporter.targets.coded_layout`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Kinds of fields: bytes that are codes of weights; little-endian floating-point numbers; anything else.
CODES, NUMBERS, ANYTHING = range(3)
KINDS = (CODES, NUMBERS, ANYTHING)


@dataclass(frozen=True)
class Field:
    """A field of a record: its kind and its width in bytes."""

    kind: int
    width: int


@dataclass(frozen=True)
class Part:
    """An array of records.

    Attributes:
        rows: Rows of a matrix; neighbouring records of a row are similar.
        records: Records per row.
        fields: Fields of a record.
    """

    rows: int
    records: int
    fields: tuple[Field, ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return sum(field.width for field in self.fields)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.records * self.record_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class FileSection:
    """A part and its start in the file."""

    start: int
    part: Part


def array_part(shape: Sequence[int], kind: np.dtype[Any]) -> Part:
    """Return the part for an array; one-byte integers are codes."""
    field = Field(NUMBERS if kind.kind == "f" else CODES if kind.itemsize == 1 else ANYTHING, kind.itemsize)
    return Part(int(shape[0]), int(np.prod(shape[1:], dtype=np.int64)), (field,))


def parts_of(sections: Sequence[FileSection], size: int, most: int) -> Iterator[Part]:
    """Yield parts that cover a file without gaps.

    Args:
        sections: The known sections of the file; a section that overlaps another or lies outside is ignored.
        size: Bytes of the file.
        most: Maximum bytes of a part.
    """
    at = 0
    for section in sorted((one for one in sections if one.part.bytes), key=lambda one: one.start):
        if section.start < at or section.start + section.part.bytes > size:
            continue
        yield from _anything(section.start - at, most)
        yield from split(section.part, most)
        at = section.start + section.part.bytes
    yield from _anything(size - at, most)


def _anything(count: int, most: int) -> Iterator[Part]:
    for first in range(0, count, most):
        yield Part(1, min(most, count - first), (Field(ANYTHING, 1),))


def split(part: Part, most: int) -> Iterator[Part]:
    """Yield a part in pieces of whole rows; if one row is too long, in pieces without structure."""
    rows = most // part.row_bytes
    if not rows:
        yield from _anything(part.bytes, most)
        return
    for first in range(0, part.rows, rows):
        yield replace(part, rows=min(rows, part.rows - first))
