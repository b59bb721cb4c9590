"""Converts records to streams of similar bytes, and back.

Each byte of a number goes to its own stream, since upper bytes repeat and lower bytes do not. If it takes fewer bytes,
all but the first number of a row are stored as differences (exclusive or) from the previous one.

Codes have a larger magnitude in some rows and columns of a matrix than in others. Rows and columns get classes: the
rounded logarithm of their mean magnitude. Codes in a row of class i and a column of class j share a table with all
codes of the same i + j. They form contiguous blocks of the stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exporter.coding.layout import CODES, NUMBERS, Field, Part
from exporter.coding.tables import SYMBOLS, Bytes, counts_of, entropy_bits

MOST_CLASSES = 16
# Candidate step sizes of classes, in the base-2 logarithm.
STEPS = (1.0, 0.5)
LEAST_REACH = 1 / 64
# Assumed cost of a table when choosing classes.
TABLE_BITS = 8 * 30


@dataclass(frozen=True)
class StreamShape:
    """How a field is split into streams.

    Attributes:
        differs: Numbers after the first of a row are stored as differences from the previous one.
        rows: Class of each row of codes, uint8 [rows]; all 0 if there is only one.
        columns: The same for each column, uint8 [records x width].
    """

    differs: bool
    rows: Bytes
    columns: Bytes

    @classmethod
    def plain(cls, rows: int, columns: int) -> "StreamShape":
        """Return the shape without differences and with a single class."""
        return cls(False, np.zeros(rows, np.uint8), np.zeros(columns, np.uint8))


@dataclass(frozen=True)
class Block:
    """Number of contiguous symbols of a stream that share a table, and the table's number within the stream."""

    symbols: int
    table: int


def shape_of(values: Bytes, field: Field, by_column: bool) -> StreamShape:
    """Choose the best split of a field, uint8 [rows, records, width], into streams.

    Args:
        values: The field's bytes.
        field: Its kind and width.
        by_column: Whether the columns of codes may have classes, which makes restoring slower.
    """
    if field.kind == CODES:
        return _classified(values.reshape(len(values), -1), by_column)[0]
    one = StreamShape.plain(len(values), values[0].size)
    if field.kind == NUMBERS and values.shape[1] > 1:
        bits = [sum(entropy_bits(counts_of(plane)) for plane in _planes(values, differs)) for differs in (False, True)]
        return replace(one, differs=bits[1] < bits[0])
    return one


def streams_of(values: Bytes, field: Field, shape: StreamShape) -> list[Bytes]:
    """Return the streams of a field, uint8 [rows, records, width]."""
    if field.kind == NUMBERS:
        return _planes(values, shape.differs)
    codes = values.reshape(len(values), -1)
    if shape.rows.any() or shape.columns.any():
        codes = codes[np.argsort(shape.rows, kind="stable")][:, np.argsort(shape.columns, kind="stable")]
    return [np.concatenate([codes[rows, columns].reshape(-1) for rows, columns, _ in _blocks(shape)])]


def blocks_of(part: Part, field: Field, shape: StreamShape) -> list[list[Block]]:
    """Return the blocks of each stream of a field."""
    if field.kind == CODES:
        spans = [
            (rows.stop - rows.start, columns.stop - columns.start, table) for rows, columns, table in _blocks(shape)
        ]
        return [[Block(rows * columns, table) for rows, columns, table in spans]]
    count = part.rows * part.records
    if field.kind != NUMBERS:
        return [[Block(count * field.width, 0)]]
    counts = [part.rows, count - part.rows] if shape.differs else [count]
    return [[Block(symbols, 0)] for symbols in counts for _ in range(field.width)]


def restore(streams: list[Bytes], field: Field, shape: StreamShape, values: Bytes) -> None:
    """Restore a field, uint8 [rows, records, width], from its streams."""
    if field.kind == NUMBERS and shape.differs:
        first, rest = streams[: field.width], streams[field.width :]
        values[:, 0] = np.stack(first, axis=1)
        values[:, 1:] = np.stack(rest, axis=1).reshape(len(values), -1, field.width)
        np.bitwise_xor.accumulate(values, axis=1, out=values)
    elif field.kind == NUMBERS:
        for plane, stream in enumerate(streams):
            values[:, :, plane] = stream.reshape(values.shape[:2])
    else:
        values[...] = _ordered_codes(streams[0], shape).reshape(values.shape)


def _ordered_codes(stream: Bytes, shape: StreamShape) -> Bytes:
    """Return codes, uint8 [rows, columns], from their stream."""
    codes = stream.reshape(len(shape.rows), -1)
    if shape.columns.any():
        codes, at = np.empty_like(codes), 0
        for rows, columns, _ in _blocks(shape):
            block = codes[rows, columns]
            block[...] = stream[at : at + block.size].reshape(block.shape)
            at += block.size
        codes = codes[:, np.argsort(np.argsort(shape.columns, kind="stable"))]
    if shape.rows.any():
        ordered = np.empty_like(codes)
        ordered[np.argsort(shape.rows, kind="stable")] = codes
        codes = ordered
    return codes


def _blocks(shape: StreamShape) -> Iterator[tuple[slice, slice, int]]:
    """Yield the rows, columns and table of each pair of classes; rows and columns are sorted by class."""
    columns = list(_spans(shape.columns))
    for row, row_class in _spans(shape.rows):
        for column, column_class in columns:
            yield row, column, row_class + column_class


def _spans(classes: Bytes) -> Iterator[tuple[slice, int]]:
    at = 0
    for number, count in enumerate(np.bincount(classes).tolist()):
        if count:
            yield slice(at, at + count), number
        at += count


def _planes(values: Bytes, differs: bool) -> list[Bytes]:
    planes = range(values.shape[2])
    if not differs:
        return [np.ascontiguousarray(values[:, :, plane]).reshape(-1) for plane in planes]
    first, rest = values[:, 0], values[:, 1:] ^ values[:, :-1]
    return [np.ascontiguousarray(first[:, plane]) for plane in planes] + [
        np.ascontiguousarray(rest[:, :, plane]).reshape(-1) for plane in planes
    ]


def coded_bits(codes: Bytes, times: float = 1.0) -> float:
    """Return the coded size of codes, uint8 [rows, columns], in bits, including classes and tables.

    Args:
        codes: The codes, or a sample of their rows.
        times: Ratio of all rows to the given rows.
    """
    return _classified(codes, True, times)[1]


def _classified(codes: Bytes, by_column: bool, times: float = 1.0) -> tuple[StreamShape, float]:
    """Return the classes of codes, uint8 [rows, columns], that take the fewest bits, and the number of bits."""
    counts = counts_of(codes)
    # Magnitude relative to the most frequent code: treats signed bytes and codes with a zero in the middle alike.
    reach = np.abs((codes - np.uint8(counts.argmax())).view(np.int8).astype(np.int16))
    of_rows, of_columns = (np.log2(reach.mean(axis=axis, dtype=np.float32) + LEAST_REACH) for axis in (1, 0))
    one = StreamShape.plain(*codes.shape)
    best, fewest = one, times * entropy_bits(counts) + TABLE_BITS
    for step in STEPS:
        tried = [replace(one, rows=_numbered(of_rows, step))]
        if by_column:
            tried.append(replace(tried[0], columns=_numbered(of_columns, step)))
        for shape in tried:
            bits = _bits(codes, shape, times)
            if bits < fewest:
                best, fewest = shape, bits
    return best, fewest


def _numbered(reach: NDArray[np.float32], step: float) -> Bytes:
    """Return classes, uint8, from log magnitudes; the smallest magnitudes share class 0."""
    steps = np.rint(reach / step)
    classes: Bytes = np.clip(steps - steps.max() + MOST_CLASSES - 1, 0, MOST_CLASSES - 1).astype(np.uint8)
    return classes


def _bits(codes: Bytes, shape: StreamShape, times: float) -> float:
    """Return the coded size of codes, uint8 [rows, columns], in bits for given classes."""
    counts = np.zeros((2 * MOST_CLASSES, SYMBOLS), np.int64)
    tables = shape.columns.astype(np.int32) * SYMBOLS
    for number in np.unique(shape.rows):
        places = (tables + codes[shape.rows == number]).reshape(-1)
        found = np.bincount(places, minlength=MOST_CLASSES * SYMBOLS)
        counts[number : number + MOST_CLASSES] += found.reshape(MOST_CLASSES, SYMBOLS)
    used = counts[counts.any(axis=1)]
    least = sum(entropy_bits(one) for one in used)
    return float(times * (least + 4 * len(codes)) + len(used) * TABLE_BITS + 4 * codes.shape[1])
