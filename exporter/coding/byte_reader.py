"""Reads values from the bytes of a coded file, never past the end."""

import struct
from typing import Any

from exporter.foundation.errors import InputError


class Reading:
    """A sequential reader of bytes.

    Args:
        data: The bytes.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._left = memoryview(data)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            InputError: fewer are left.
        """
        if count > len(self._left):
            raise InputError("the coded file ends early", got=f"{len(self._left)} bytes", expected=count)
        taken, self._left = self._left[:count], self._left[count:]
        return bytes(taken)

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Return the next values in `struct` format, little-endian."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def end(self) -> None:
        """Check that no bytes are left.

        Raises:
            InputError: some are left.
        """
        if len(self._left):
            raise InputError("the coded file holds bytes that mean nothing", got=len(self._left), expected=0)
