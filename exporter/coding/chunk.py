"""One chunk of a coded file: some parts of the original, each split into streams, each stream coded.

A chunk is self-contained: it holds its layout, tables and streams. Chunks can therefore be coded and restored on all
cores, and restoring needs memory for only a few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from exporter.coding import ans
from exporter.coding.byte_reader import Reading
from exporter.coding.huffman import huffman_bytes, read_huffman, read_zstd, searched_bytes
from exporter.coding.layout import ANYTHING, CODES, KINDS, NUMBERS, Field, Part
from exporter.coding.profiles import Profile
from exporter.coding.streams import MOST_CLASSES, Block, StreamShape, blocks_of, restore, shape_of, streams_of
from exporter.coding.tables import SYMBOLS, Bytes, counts_of, entropy_bits, read_table, shares_of, table_bytes
from exporter.foundation.errors import InputError

# Limits of a chunk, so that restoring takes only a few times its size in memory; a table takes 18 KiB. A chunk beyond
# them is coded as bytes without structure.
MOST_PARTS, MOST_FIELDS, MOST_BLOCKS, MOST_TABLES = 1 << 12, 8, 1 << 16, 1 << 12
MOST_NUMBER_BYTES = 8
# Coding of a stream: uncoded, `ans`, `huffman`, or Zstandard with its search for repetitions.
_RAW, _ANS, _HUFFMAN, _SEARCHED = range(4)


@dataclass(frozen=True)
class CodedChunk:
    """A coded chunk.

    Attributes:
        payload: Its bytes.
        entropy_bytes: Lower bound for its streams, each coded byte by byte with one histogram; for streams of neither
            codes nor numbers, their coded size.
    """

    payload: bytes
    entropy_bytes: float


@dataclass(frozen=True)
class _Stream:
    """The bytes of a stream, its blocks, and its coding."""

    symbols: Bytes
    blocks: list[Block]
    method: int
    coded: bytes


def encode(data: bytes, parts: Sequence[Part], profile: Profile) -> CodedChunk:
    """Code bytes as a chunk.

    Args:
        data: The concatenated bytes of the parts.
        parts: The layout of the bytes.
        profile: `small` for the fewest bytes, `fast` for fast restoring.
    """
    if len(parts) > MOST_PARTS:
        return _as_anything(data, profile)
    head, streams, entropy = [np.uint16(len(parts)).tobytes(), *map(_described, parts)], [], 0.0
    for part, field, values in _fields(np.frombuffer(data, np.uint8), parts):
        shape = shape_of(values, field, profile == "small")
        head.append(_described_shape(shape))
        for symbols, blocks in zip(streams_of(values, field, shape), blocks_of(part, field, shape), strict=True):
            stream = _coded(symbols, blocks, field, profile)
            least = len(stream.coded) if field.kind == ANYTHING else entropy_bits(counts_of(symbols)) / 8
            entropy += min(least, len(symbols))
            streams.append(stream)
    if _is_too_fine([stream.blocks for stream in streams], [stream.method for stream in streams]):
        return _as_anything(data, profile)
    head.append(bytes(one.method for one in streams))
    return CodedChunk(b"".join([*head, _ans_bytes(streams), *(one.coded for one in streams)]), entropy)


def _as_anything(data: bytes, profile: Profile) -> CodedChunk:
    return encode(data, [Part(1, len(data), (Field(ANYTHING, 1),))], profile)


def decode(payload: bytes, size: int) -> Bytes:
    """Return the decoded bytes of a chunk, uint8 [size].

    Raises:
        InputError: it does not decode to `size` bytes.
    """
    reading = Reading(payload)
    parts, shapes = _read_parts(reading, size)
    fields = [(part, field) for part in parts for field in part.fields]
    counts, room = [], MOST_BLOCKS
    for (part, field), shape in zip(fields, shapes, strict=True):
        counts.append(blocks_of(part, field, shape))
        room -= sum(map(len, counts[-1]))
        if room < 0:
            raise InputError("a chunk of the coded file has too many blocks", expected=f"at most {MOST_BLOCKS}")
    blocks = [stream for streams in counts for stream in streams]
    methods = list(reading.take(len(blocks)))
    if _is_too_fine(blocks, methods):
        raise InputError("a chunk of the coded file has too many tables", expected=f"at most {MOST_TABLES}")
    modelled = iter(_read_ans(reading, [some for some, method in zip(blocks, methods, strict=True) if method == _ANS]))
    streams = [
        next(modelled) if method == _ANS else _read_stream(reading, sum(block.symbols for block in some), method)
        for some, method in zip(blocks, methods, strict=True)
    ]
    reading.end()
    data, coming = np.empty(size, np.uint8), iter(streams)
    for (_, field, values), shape, some in zip(_fields(data, parts), shapes, counts, strict=True):
        restore(list(islice(coming, len(some))), field, shape, values)
    return data


def _is_too_fine(streams: Sequence[Sequence[Block]], methods: Sequence[int]) -> bool:
    """Return whether streams exceed a chunk's limit of blocks or tables."""
    modelled = (blocks for blocks, method in zip(streams, methods, strict=True) if method == _ANS)
    tables = sum(len({block.table for block in blocks}) for blocks in modelled)
    return tables > MOST_TABLES or sum(map(len, streams)) > MOST_BLOCKS


def _fields(data: Bytes, parts: Sequence[Part]) -> list[tuple[Part, Field, Bytes]]:
    """Return every field of every part as a view of the bytes, uint8 [rows, records, width]."""
    found, at = [], 0
    for part in parts:
        records = data[at : at + part.bytes].reshape(part.rows, part.records, part.record_bytes)
        at, first = at + part.bytes, 0
        for field in part.fields:
            found.append((part, field, records[:, :, first : first + field.width]))
            first += field.width
    return found


def _described(part: Part) -> bytes:
    counts = np.array([part.rows, part.records, len(part.fields)], "<u4").tobytes()
    return counts + b"".join(bytes((field.kind,)) + np.uint16(field.width).tobytes() for field in part.fields)


def _described_shape(shape: StreamShape) -> bytes:
    """Return a byte of flags, then the classes of rows and of columns if there are several, two per byte."""
    flags = bytes((shape.differs | bool(shape.rows.any()) << 1 | bool(shape.columns.any()) << 2,))
    return flags + b"".join(_nibbles(classes) for classes in (shape.rows, shape.columns) if classes.any())


def _nibbles(classes: Bytes) -> bytes:
    padded = np.pad(classes, (0, len(classes) % 2))
    return (padded[::2] | padded[1::2] << 4).tobytes()


def _read_parts(reading: Reading, size: int) -> tuple[list[Part], list[StreamShape]]:
    (count,) = reading.unpack("H")
    if count > MOST_PARTS:
        raise InputError("a chunk of the coded file has too many parts", got=count, expected=f"at most {MOST_PARTS}")
    parts, left = [], size
    for _ in range(count):
        rows, records, fields = reading.unpack("III")
        if not 1 <= fields <= MOST_FIELDS:
            expected = f"1 to {MOST_FIELDS}"
            raise InputError("a part of the coded file has a strange count of fields", got=fields, expected=expected)
        part = Part(rows, records, tuple(Field(*reading.unpack("BH")) for _ in range(fields)))
        left -= part.bytes
        if any(map(_is_strange, part.fields)) or not part.bytes or left < 0:
            raise InputError("a part of the coded file is not what a chunk can hold", got=part)
        parts.append(part)
    if left:
        raise InputError("the parts of a chunk do not make it up", got=size - left, expected=size)
    return parts, [_read_shape(reading, part, field) for part in parts for field in part.fields]


def _is_strange(field: Field) -> bool:
    too_wide = field.kind == NUMBERS and field.width > MOST_NUMBER_BYTES
    return field.kind not in KINDS or not field.width or too_wide


def _read_shape(reading: Reading, part: Part, field: Field) -> StreamShape:
    (flags,) = reading.take(1)
    known = {CODES: (0, 2, 4, 6), NUMBERS: (0, 1), ANYTHING: (0,)}
    if flags not in known[field.kind]:
        raise InputError("a field of the coded file has strange flags", got=flags)
    plain = StreamShape.plain(part.rows, part.records * field.width)
    of_rows = _read_classes(reading, len(plain.rows)) if flags & 2 else plain.rows
    of_columns = _read_classes(reading, len(plain.columns)) if flags & 4 else plain.columns
    return StreamShape(bool(flags & 1), of_rows, of_columns)


def _read_classes(reading: Reading, count: int) -> Bytes:
    pairs = np.frombuffer(reading.take((count + 1) // 2), np.uint8)
    return np.stack([pairs & np.uint8(MOST_CLASSES - 1), pairs >> np.uint8(4)], axis=1).reshape(-1)[:count]


def _coded(symbols: Bytes, blocks: list[Block], field: Field, profile: Profile) -> _Stream:
    if field.kind == ANYTHING:
        methods = {_SEARCHED: searched_bytes(symbols)}
    elif profile == "fast":
        methods = {_HUFFMAN: huffman_bytes(symbols)}
    else:
        counts = counts_of(symbols)
        if entropy_bits(counts) / 8 + 2 * np.count_nonzero(counts) < len(symbols):
            return _Stream(symbols, blocks, _ANS, b"")
        methods = {}
    ((method, coded),) = methods.items() or {_RAW: symbols.tobytes()}.items()
    return _Stream(symbols, blocks, method, coded) if len(coded) < len(symbols) else _raw(symbols, blocks)


def _raw(symbols: Bytes, blocks: list[Block]) -> _Stream:
    return _Stream(symbols, blocks, _RAW, symbols.tobytes())


@dataclass(frozen=True)
class _Runs:
    """Blocks of several streams for `ans`: their sizes and table indices, int64 [blocks]."""

    sizes: NDArray[np.int64]
    used: NDArray[np.int64]

    @classmethod
    def of(cls, streams: list[list[Block]]) -> "_Runs":
        """Number the tables of all streams, skipping unused ones."""
        named = [(number, block.table) for number, some in enumerate(streams) for block in some]
        order = {name: place for place, name in enumerate(sorted(set(named)))}
        sizes = [block.symbols for some in streams for block in some]
        return cls(np.array(sizes, np.int64), np.array([order[name] for name in named], np.int64))


def _ans_bytes(streams: list[_Stream]) -> bytes:
    """Return the tables, states and words of all streams coded by `ans`."""
    modelled = [stream for stream in streams if stream.method == _ANS]
    if not modelled:
        return b""
    runs = _Runs.of([stream.blocks for stream in modelled])
    symbols = np.concatenate([stream.symbols for stream in modelled])
    counts = np.zeros((int(runs.used.max()) + 1, SYMBOLS), np.int64)
    for end, size, table in zip(runs.sizes.cumsum(), runs.sizes, runs.used, strict=True):
        counts[table] += counts_of(symbols[end - size : end])
    tables = np.stack([shares_of(one) for one in counts])
    states, words = ans.encode(symbols, tables, runs.sizes, runs.used)
    lengths = np.array([len(states), len(words)], "<u4").tobytes()
    coded = states.astype("<u4").tobytes() + words.astype("<u2").tobytes()
    return b"".join(table_bytes(table) for table in tables) + lengths + coded


def _read_ans(reading: Reading, streams: list[list[Block]]) -> list[Bytes]:
    if not streams:
        return []
    runs = _Runs.of(streams)
    tables = np.stack([read_table(reading) for _ in range(int(runs.used.max()) + 1)])
    lanes, count = reading.unpack("II")
    states = np.frombuffer(reading.take(4 * lanes), "<u4").astype(np.uint32)
    words = np.frombuffer(reading.take(2 * count), "<u2").astype(np.uint16)
    ends = np.cumsum([sum(block.symbols for block in stream) for stream in streams])
    return list(np.split(ans.decode(states, words, tables, runs.sizes, runs.used), ends[:-1]))


def _read_stream(reading: Reading, size: int, method: int) -> Bytes:
    if method == _RAW:
        return np.frombuffer(reading.take(size), np.uint8)
    if method == _HUFFMAN:
        return read_huffman(reading, size)
    if method == _SEARCHED:
        return np.frombuffer(read_zstd(reading, size), np.uint8)
    raise InputError("a stream of the coded file is coded in an unknown way", got=method)
