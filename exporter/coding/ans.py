"""Asymmetric numeral systems: codes symbols at the entropy of their tables, with many interleaved lanes.

This is the range variant (Duda 2013, "Asymmetric numeral systems", section 2; interleaved as in Giesen 2014). A state x
codes a symbol of share f and cumulative share c, out of 2^k, as x' = floor(x / f) 2^k + c + x mod f. A state stays in
[2^16, 2^32); it emits its lower 16 bits before it would exceed that. Symbol i belongs to lane i mod lanes, so one array
operation advances all lanes. The lanes read their words in order from one common sequence.
"""

import numpy as np
from numpy.typing import NDArray

from exporter.coding.tables import PRECISION, SYMBOLS, TOTAL, Bytes, Shares
from exporter.foundation.errors import InputError

MOST_LANES = 2048
# A lane costs 2 bytes more than the entropy of its symbols.
SYMBOLS_A_LANE = 2048
LOWEST = np.uint32(1 << 16)
WORD_BITS = np.uint32(16)
SLOT = np.uint32(TOTAL - 1)


def lanes_for(symbols: int) -> int:
    """Return the number of lanes for a number of symbols."""
    return max(1, min(MOST_LANES, symbols // SYMBOLS_A_LANE))


def encode(
    symbols: Bytes, tables: Shares, sizes: NDArray[np.int64], used: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Return the final states, uint32 [lanes], and the words, uint16 [words], of symbols, uint8 [symbols].

    Args:
        symbols: Symbols to code; each has a share in its table.
        tables: Shares, uint32 [tables, 256].
        sizes: Number of consecutive symbols that share a table, int64 [runs].
        used: Table index of each run, int64 [runs].
    """
    lanes = lanes_for(len(symbols))
    shares, starts = _flat(tables)
    place = np.repeat((used * SYMBOLS).astype(np.uint32), sizes)
    place += symbols
    states = np.full(lanes, LOWEST)
    words = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        step = place[first : first + lanes]
        share, state = shares[step], states[: len(step)]
        full = state >> np.uint32(32 - PRECISION) >= share
        words.append(state[full].astype(np.uint16))
        state[full] >>= WORD_BITS
        quotient = state // share
        state -= quotient * share
        state += (quotient << np.uint32(PRECISION)) + starts[step]
    return states, np.concatenate([np.empty(0, np.uint16), *words[::-1]])


def decode(
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
    tables: Shares,
    sizes: NDArray[np.int64],
    used: NDArray[np.int64],
) -> Bytes:
    """Return the symbols, uint8 [symbols], from the results of `encode` and its other arguments.

    Raises:
        InputError: states and words do not belong to this number of symbols of these tables.
    """
    count, lanes = int(sizes.sum()), len(states)
    if lanes != lanes_for(count):
        raise InputError("the coded symbols have another count of lanes", got=lanes, expected=lanes_for(count))
    shares, starts = _flat(tables)
    every = np.tile(np.arange(SYMBOLS, dtype=np.uint8), len(tables))
    symbol_at = np.repeat(every, shares)
    table = np.repeat(used.astype(np.min_scalar_type(len(tables))), sizes)
    symbols = np.empty(count, np.uint8)
    states, at = states.copy(), 0
    for first in range(0, count, lanes):
        step = table[first : first + lanes].astype(np.uint32)
        state = states[: len(step)]
        slot = state & SLOT
        found = symbol_at[(step << np.uint32(PRECISION)) + slot]
        symbols[first : first + lanes] = found
        place = (step << np.uint32(8)) + found
        state >>= np.uint32(PRECISION)
        state *= shares[place]
        state += slot - starts[place]
        low = np.flatnonzero(state < LOWEST)
        given = words[at : at + len(low)]
        if len(given) < len(low):
            raise InputError("the coded symbols end early", got=f"{len(words)} words")
        state[low] = state[low] << WORD_BITS | given
        at += len(low)
    if at != len(words) or (states != LOWEST).any():
        raise InputError("the coded symbols do not end where they should", got=f"{len(words) - at} words left")
    return symbols


def _flat(tables: Shares) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the concatenated shares and cumulative shares of all tables, uint32 [tables x 256]."""
    starts = tables.cumsum(axis=1, dtype=np.uint32) - tables
    return tables.reshape(-1), starts.reshape(-1)
