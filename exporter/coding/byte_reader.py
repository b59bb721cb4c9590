"""Reading what a coded file claims to hold, never past its end."""

import struct
from typing import Any

from exporter.foundation.errors import InputError


class Reading:
    """Bytes that are taken one part after the other.

    Args:
        data: All of them.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._left = memoryview(data)

    def take(self, count: int) -> bytes:
        """Return the next bytes.

        Raises:
            InputError: there are not so many left.
        """
        if count > len(self._left):
            raise InputError("the coded file ends early", got=f"{len(self._left)} bytes", expected=count)
        taken, self._left = self._left[:count], self._left[count:]
        return bytes(taken)

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Return the next values in the form of `struct`, little-endian."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def end(self) -> None:
        """Refuse bytes that are left.

        Raises:
            InputError: there are some.
        """
        if len(self._left):
            raise InputError("the coded file holds bytes that mean nothing", got=len(self._left), expected=0)
