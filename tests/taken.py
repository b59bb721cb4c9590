"""A runtime that a model has taken over: its process writes to the pipe what it likes. It imports little."""

import os
import time
from pathlib import Path


def framed(header: bytes, arrays: bytes = b"") -> bytes:
    return len(header).to_bytes(4, "little") + len(arrays).to_bytes(8, "little") + header + arrays


def array(dtype: str, shape: str) -> bytes:
    return b'{"value": {"dtype": "%s", "shape": %s}}' % (dtype.encode(), shape.encode())


ROWS = 4 * b"\0\0\x80\x3f"
# What it sends, seconds that it waits meanwhile, and what is said.
ANSWERS: dict[str, list[bytes | float]] = {
    "garbage": [bytes(range(16)) + 8 * b"\xff"],
    "header": [(0xFFFFFFFF).to_bytes(4, "little") + bytes(8)],
    "arrays": [(40).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")],
    "pickle": [framed(b"cos\nsystem\n(S'touch taken'\ntR.")],
    "deep": [framed(b"[" * 1_000_000)],
    "lists": [framed(b'{"value": [' + (b"[" * 900 + b"]" * 900 + b",") * 5800 + b"0]}")],
    "digits": [framed(b'{"value": ' + b"9" * 5000 + b"}")],
    "no UTF-8": [framed(b'{"value": "\xff"}')],
    "another value": [framed(b'{"value": "text"}')],
    "no message": [framed(b"[]")],
    "another dtype": [framed(array("<f8", "[2]"), ROWS)],
    "objects": [framed(array("|O", "[2]"), ROWS)],
    "a large shape": [framed(array("<f4", "[1000000, 1000000]"), ROWS)],
    "an absurd shape": [framed(array("<f4", f"[0, {10**30}]"), ROWS)],
    "a negative shape": [framed(array("<f4", "[-1, 4]"), ROWS)],
    "dimensions": [framed(array("<f4", str([1] * 100)), ROWS)],
    "another error": [framed(b'{"error": "SystemExit", "message": ""}')],
    "a nameless error": [framed(b'{"error": [], "message": 1}')],
    "nothing": [],
    "drops": [framed(b" " * 200)[:12], *([0.02, b" "] * 199)],
    "part": [framed(array("<f4", "[4]"), ROWS)[:-1]],
    "closed": [],
}


class Taken:
    """Lies in one of several ways."""

    def lie(self, how: str) -> None:
        pipe = next(int(path.name) for path in Path("/proc/self/fd").iterdir() if path.is_socket())
        for part in ANSWERS[how]:
            if isinstance(part, bytes):
                os.write(pipe, part)
            else:
                time.sleep(part)
        if how == "part":
            os._exit(3)
        if how == "closed":
            os.close(pipe)
        time.sleep(60)
