"""Static histograms of bytes: integer shares of a power of two, and their compact storage."""

import numpy as np
from numpy.typing import NDArray

from exporter.coding.byte_reader import Reading
from exporter.foundation.errors import InputError

Bytes = NDArray[np.uint8]
Shares = NDArray[np.uint32]
# Shares are fractions of 2^14. Rare outliers, each of which needs a share, then cost the others little.
PRECISION = 14
TOTAL = 1 << PRECISION
SYMBOLS = 256
# A share below this takes one byte in a stored table, any other two.
ONE_BYTE = 1 << 7


def counts_of(symbols: Bytes) -> NDArray[np.int64]:
    """Return the count of each symbol, int64 [256]."""
    return np.bincount(symbols.reshape(-1), minlength=SYMBOLS)


def entropy_bits(counts: NDArray[np.int64]) -> float:
    """Return the minimum bits of symbols with these counts when coded one by one: n times their entropy."""
    seen = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return float(-(seen * np.log2(seen / total)).sum()) if total else 0.0


def shares_of(counts: NDArray[np.int64]) -> Shares:
    """Return integer shares of `TOTAL` proportional to the counts, uint32 [256], at least 1 for symbols that occur.

    Rounding errors are corrected where that costs the fewest bits.
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
    """Return a stored table: the first symbol, the number of further symbols, and their shares.

    A set highest bit marks a share of two bytes. A share of 0 is followed by the number of further zeros.
    """
    seen = np.flatnonzero(shares)
    first, last = int(seen[0]), int(seen[-1])
    stored = bytearray((first, last - first))
    # A single symbol's share is `TOTAL`, which would not fit; having no further symbols implies it.
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
        InputError: it ends early, or its shares do not sum to `TOTAL`.
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
