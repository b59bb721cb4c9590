"""Codes streams with Zstandard's Huffman coder, packing two codes into a symbol if that takes fewer bytes.

A Huffman code spends whole bits on a symbol, which is wasteful if most codes are zero. So two codes among the 15 most
frequent form one symbol; an escape marks other codes, which are listed. Half as many symbols also restore faster.
"""

import numpy as np
import zstandard
from numpy.typing import NDArray

from exporter.coding.byte_reader import Reading
from exporter.coding.tables import Bytes, counts_of
from exporter.foundation.errors import InputError

COMMON = 15
_ESCAPE = np.uint8(COMMON)
_SINGLE, _PAIRS = range(2)
# Codes of weights do not repeat, so these settings minimise the search for repetitions. (A target length would turn the
# Huffman coder off.)
_CODER = zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7)
_SEARCHING = zstandard.ZstdCompressionParameters.from_level(19)
_WINDOW_BYTES = 1 << 23


def searched_bytes(symbols: Bytes) -> bytes:
    """Return symbols as a Zstandard frame, preceded by its length."""
    return _frame(symbols, _SEARCHING)


def huffman_bytes(symbols: Bytes) -> bytes:
    """Return symbols coded singly or in pairs, whichever is shorter."""
    single, pairs = _frame(symbols, _CODER), _pairs(symbols)
    return bytes((_PAIRS,)) + pairs if len(pairs) < len(single) else bytes((_SINGLE,)) + single


def _pairs(symbols: Bytes) -> bytes:
    counts = counts_of(symbols)
    common = np.argsort(-counts, kind="stable")[:COMMON].astype(np.uint8)
    place = np.full(256, _ESCAPE)
    place[common] = np.arange(COMMON, dtype=np.uint8)
    places = np.pad(place[symbols], (0, len(symbols) % 2))
    others = symbols[places[: len(symbols)] == _ESCAPE]
    made: bytes = (
        common.tobytes() + _frame(places[::2] | places[1::2] << np.uint8(4), _CODER)
        + np.uint32(len(others)).tobytes() + others.tobytes()
    )  # fmt: skip
    return made


def read_huffman(reading: Reading, size: int) -> Bytes:
    """Return the symbols, uint8 [size], that `huffman_bytes` coded.

    Raises:
        InputError: the bytes do not decode to this number of symbols.
    """
    (kind,) = reading.take(1)
    if kind == _SINGLE:
        return np.frombuffer(read_zstd(reading, size), np.uint8)
    if kind != _PAIRS:
        raise InputError("symbols of the coded file are neither single nor in pairs", got=kind)
    common = np.frombuffer(reading.take(COMMON), np.uint8)
    pairs = np.frombuffer(read_zstd(reading, (size + 1) // 2), np.uint8)
    (count,) = reading.unpack("I")
    others = np.frombuffer(reading.take(count), np.uint8)
    both = np.arange(256, dtype=np.uint8)
    symbol = np.append(common, np.uint8(0))
    symbols: Bytes = (
        np.stack([symbol[both & 15], symbol[both >> 4]], axis=1).view(np.uint16)[pairs, 0].view(np.uint8)[:size]
    )
    escaped = _escaped(pairs)[:size]
    if np.count_nonzero(escaped) != count:
        raise InputError("the coded file escapes another count of symbols than it lists", got=count)
    symbols[escaped] = others
    return symbols


def _escaped(pairs: Bytes) -> NDArray[np.bool_]:
    """Return the positions of the escape as bool [2 x pairs]."""
    both = np.arange(256, dtype=np.uint8)
    table = np.stack([both & 15, both >> 4], axis=1) == _ESCAPE
    escaped: NDArray[np.bool_] = table.view(np.uint16)[pairs, 0].view(np.bool_)
    return escaped


def _frame(symbols: Bytes, parameters: zstandard.ZstdCompressionParameters) -> bytes:
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(symbols.tobytes())
    return np.uint32(len(frame)).tobytes() + frame


def read_zstd(reading: Reading, size: int) -> bytes:
    """Return the decoded bytes of a Zstandard frame preceded by its length.

    Raises:
        InputError: it is damaged, or decodes to another number of bytes.
    """
    (length,) = reading.unpack("I")
    frame = reading.take(length)
    try:
        # Check the size that the frame claims, since the library allocates it.
        if zstandard.frame_content_size(frame) != size:
            raise InputError("a Zstandard frame of the coded file has another size", expected=size)
        decoder = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        symbols: bytes = decoder.decompress(frame, max_output_size=size)
    except zstandard.ZstdError as error:
        raise InputError("a Zstandard frame of the coded file is damaged", got=error) from error
    return symbols
