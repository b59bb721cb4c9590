"""Reads the logits that a program on an emulated core wrote to a file; the file is untrusted until it is checked."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.foundation.errors import RuntimeCrashError

MOST_VOCAB = 1 << 20
HEADER_BYTES = 4096


def read_logits(path: Path, count: int) -> NDArray[np.float32]:
    """Return logits, float32 [count, vocab], from a .npy file; nothing in it is executed.

    Raises:
        RuntimeCrashError: the file is missing, or holds something else, or numbers that are not finite.
    """
    size = path.stat().st_size if path.is_file() else 0
    if not 0 < size <= HEADER_BYTES + 4 * MOST_VOCAB * count:
        raise _wrong(path, f"{size:,} bytes", count)
    try:
        logits: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise _wrong(path, str(error), count) from error
    if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != count or not logits.size:
        raise _wrong(path, f"{logits.dtype} {list(logits.shape)}", count)
    if not np.isfinite(logits).all():
        raise _wrong(path, "numbers that are not finite", count)
    return logits


def _wrong(path: Path, got: str, count: int) -> RuntimeCrashError:
    return RuntimeCrashError(
        "the emulated program left no logits",
        where=path.name,
        got=got,
        expected=f"finite float32 [{count}, vocabulary]",
    )
