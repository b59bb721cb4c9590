"""Keeps the arrays of a coded file coded in memory and decodes them on request.

Arrays are re-coded individually as they are read, whatever the file's coding. Decoding is then fast and covers only the
requested arrays.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter.coding.chunk import decode, encode
from exporter.coding.container import on_all_cores, original_of, restored_chunks
from exporter.coding.layout import FileSection, Part, split
from exporter.coding.tables import Bytes
from exporter.foundation.errors import InputError

# Bytes of an array coded together.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """A range of bytes of the original: start and size."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The first byte after the range."""
        return self.start + self.size


class ResidentFile:
    """Arrays of a coded file, kept coded in memory.

    Args:
        coded: The coded file. It must stay in place, since released arrays are read from it again.
        arrays: Position and layout of the arrays in the original.

    Raises:
        InputError: it is not a coded file, was changed, truncated or extended, or its original has no such arrays.
    """

    def __init__(self, coded: Path, arrays: Iterable[FileSection]) -> None:
        self._path = coded
        ordered = sorted(arrays, key=lambda array: array.start)
        ends = [*(array.start for array in ordered), original_of(coded).size][1:]
        for array, end in zip(ordered, ends, strict=True):
            if array.start < 0 or array.start + array.part.bytes > end:
                raise self._outside(Span(array.start, array.part.bytes))
        self._pieces = [
            FileSection(start, part)
            for array in ordered
            for start, part in _placed(array.start, split(array.part, PIECE_BYTES))
        ]
        self._starts = [piece.start for piece in self._pieces]
        self._payloads: dict[int, bytes] = {}
        self.hold([Span(array.start, array.part.bytes) for array in ordered])

    @property
    def held_bytes(self) -> int:
        """Bytes in memory."""
        return sum(map(len, self._payloads.values()))

    def hold(self, spans: Iterable[Span]) -> None:
        """Keep the pieces of arrays that contain these spans in memory, and release all others."""
        wanted = sorted({number for span in spans for number in self._numbers(span)})
        missing = [number for number in wanted if number not in self._payloads]
        self._payloads = {number: self._payloads[number] for number in wanted if number in self._payloads}
        if missing:
            for number, payload in on_all_cores(self._coded, self._read(missing)):
                self._payloads[number] = payload

    def read(self, spans: Sequence[Span]) -> list[Bytes]:
        """Return the bytes of each span, uint8 [size].

        Raises:
            InputError: a span lies outside the arrays.
        """
        made = []
        # Cache the last piece: rows of a table that are looked up together are often in one piece.
        last, data = -1, np.empty(0, np.uint8)
        for span in spans:
            values, done = np.empty(span.size, np.uint8), 0
            for number in self._numbers(span):
                piece = self._pieces[number]
                if number != last:
                    last, data = number, decode(self._payloads[number], piece.part.bytes)
                first = span.start + done - piece.start
                count = min(len(data) - first, span.size - done)
                values[done : done + count] = data[first : first + count]
                done += count
            made.append(values)
        return made

    def _coded(self, given: tuple[int, bytes]) -> tuple[int, bytes]:
        number, data = given
        return number, encode(data, [self._pieces[number].part], "fast").payload

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of some pieces in order; reads the whole file, since the checksum covers all of it."""
        waiting, at, held = iter(numbers), 0, bytearray()
        number = next(waiting, None)
        for chunk in restored_chunks(self._path, workers=1):
            held += chunk
            while number is not None:
                piece = self._pieces[number]
                first = piece.start - at
                if piece.start + piece.part.bytes > at + len(held):
                    break
                yield number, bytes(held[first : first + piece.part.bytes])
                del held[: first + piece.part.bytes]
                at += first + piece.part.bytes
                number = next(waiting, None)
            if number is None or self._pieces[number].start >= at + len(held):
                at += len(held)
                held.clear()
        if number is not None:
            raise self._outside(Span(self._pieces[number].start, self._pieces[number].part.bytes))

    def _numbers(self, span: Span) -> range:
        """Return the numbers of the contiguous pieces that contain a span."""
        first = bisect_right(self._starts, span.start) - 1
        at, number = span.start, first
        while at < span.end:
            if not 0 <= number < len(self._pieces):
                raise self._outside(span)
            piece = self._pieces[number]
            if not piece.start <= at < piece.start + piece.part.bytes:
                raise self._outside(span)
            at, number = piece.start + piece.part.bytes, number + 1
        return range(first, number)

    def _outside(self, span: Span) -> InputError:
        return InputError(
            "a coded file holds no such array", where=self._path, got=f"bytes {span.start:,} to {span.end:,}"
        )


def _placed(start: int, parts: Iterable[Part]) -> Iterator[tuple[int, Part]]:
    """Yield the start of each of some consecutive parts, and the part."""
    for part in parts:
        yield start, part
        start += part.bytes
