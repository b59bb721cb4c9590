"""Static histograms of bytes: how often each symbol occurs, as whole shares of a power of two, and as few bytes."""

import numpy as np
from numpy.typing import NDArray

from exporter.coding.byte_reader import Reading
from exporter.foundation.errors import InputError

Bytes = NDArray[np.uint8]
Shares = NDArray[np.uint32]
# Shares are of 2^14: so fine that rare outliers, each of which needs a share, cost the others hardly anything.
PRECISION = 14
TOTAL = 1 << PRECISION
SYMBOLS = 256
# A share below this takes one byte in a stored table, any other two.
ONE_BYTE = 1 << 7


def counts_of(symbols: Bytes) -> NDArray[np.int64]:
    """Return how often each symbol occurs, int64 [256]."""
    return np.bincount(symbols.reshape(-1), minlength=SYMBOLS)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the bits that symbols of these counts take at least when coded one by one: n times their entropy."""
    seen = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return float(-(seen * np.log2(seen / total)).sum()) if total else 0.0


def shares_of(counts: NDArray[np.int64]) -> Shares:
    """Return whole shares of `TOTAL` that follow the counts, uint32 [256]; none is 0 for a symbol that occurs.

    What rounding leaves over or short is settled where it costs the fewest bits.
    """
    total = int(counts.sum())
    shares = np.maximum(counts * TOTAL // max(total, 1), counts > 0).astype(np.int64)
    while (short := TOTAL - int(shares.sum())) != 0:
        step = 1 if short > 0 else -1
        may = (counts > 0) & (shares + step > 0)
        change = np.where(may, counts * np.log2(np.where(may, shares + step, 1) / np.maximum(shares, 1)), -np.inf)
        best = np.argsort(-change, kind="stable")[: min(abs(short), int(may.sum()))]
        shares[best] += step
    return shares.astype(np.uint32)


def table_bytes(shares: Shares) -> bytes:
    """Return a table: the first symbol, how many follow, and the share of each; the highest bit says "two bytes".

    After a share of 0 stands how many more of them follow.
    """
    seen = np.flatnonzero(shares)
    first, last = int(seen[0]), int(seen[-1])
    stored = bytearray((first, last - first))
    # Only a symbol that is alone has the whole, which would not fit: it is told by nothing following.
    at = first if first < last else last + 1
    while at <= last:
        share = int(shares[at])
        zeros = int(seen[np.searchsorted(seen, at)]) - at
        stored += bytes((0, zeros - 1)) if zeros else _stored(share)
        at += zeros or 1
    return bytes(stored)


def _stored(share: int) -> bytes:
    return bytes((share,)) if share < ONE_BYTE else bytes((ONE_BYTE | share >> 8, share & 255))


def read_table(reading: Reading) -> Shares:
    """Return the shares of a stored table, uint32 [256].

    Raises:
        InputError: it ends early, or its shares do not make a whole.
    """
    first, following = reading.take(2)
    shares = np.zeros(SYMBOLS, np.uint32)
    if first + following >= SYMBOLS:
        raise InputError("a table of the coded file names symbols that do not exist", got=first + following)
    if following == 0:
        shares[first] = TOTAL
        return shares
    symbol = first
    while symbol <= first + following:
        (share,) = reading.take(1)
        if share == 0:
            symbol += reading.take(1)[0]
        else:
            shares[symbol] = share if share < ONE_BYTE else (share & ONE_BYTE - 1) << 8 | reading.take(1)[0]
        symbol += 1
    if int(shares.sum()) != TOTAL:
        raise InputError("the shares of a table do not make a whole", got=int(shares.sum()), expected=TOTAL)
    return shares
