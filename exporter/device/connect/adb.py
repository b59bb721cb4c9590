"""Phones, through the adb server of this machine and adbutils. The server is the user's: it is not started here."""

import os
import socket
from typing import TYPE_CHECKING, BinaryIO

from exporter.device.connect.connection import (
    MAX_ANSWER_BYTES,
    Address,
    Advance,
    Answer,
    dropped,
    pieces,
    too_long,
    too_much,
)
from exporter.errors import RequestError
from exporter.toml import shown

if TYPE_CHECKING:
    from adbutils import AdbConnection, AdbDevice

DEFAULT_PORT = 5037
CONNECT_S = 3
SHELL_V2 = "shell_v2"
STDOUT, STDERR, EXIT = 1, 2, 3
STEPS = {
    "unauthorized": "unlock the phone and accept this machine's key on its screen",
    "offline": "plug the cable in again, or run adb reconnect",
    "not found": "take a serial from the list that adb devices prints",
}


class Adb:
    """A phone that the adb server reaches.

    Args:
        address: Its serial.

    Raises:
        RequestError: no adb server answers, or it does not reach such a phone.
    """

    # The one place that a shell of adb may write to and run programs from.
    parent = "/data/local/tmp"

    def __init__(self, address: Address) -> None:
        self.where = address.text
        host, port = _server()
        from adbutils import AdbClient
        from adbutils.errors import AdbError, AdbTimeout

        self._refused, self._late = AdbError, AdbTimeout
        self._device: AdbDevice = AdbClient(host, port).device(serial=address.host)
        try:
            features = self._device.get_features().split(",")
        except (AdbError, OSError) as error:
            raise self._refusal(error) from error
        if SHELL_V2 not in features:
            raise RequestError("the phone's adb is too old", where=self.where, expected="Android 7 or newer")

    def run(self, command: str, timeout_s: float) -> Answer:
        """Run a line of shell there; see `Connection.run`."""
        try:
            with self._device.open_transport(timeout=timeout_s) as transport:
                transport.send_command(f"shell,v2,raw:{command}")
                transport.check_okay()
                return self._answer(transport)
        except (self._late, TimeoutError) as error:
            raise too_long(self.where, timeout_s) from error
        except (self._refused, OSError, EOFError) as error:
            raise dropped(self.where, error) from error

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Write a file there; see `Connection.send`."""
        try:
            self._device.sync.push(_Pieces(source, advance), target, mode=0o700)
        except self._refused as error:
            if not str(error):
                raise dropped(self.where, "no status of the file") from error
            raise RequestError("the device could not write the file", where=target, got=shown(str(error))) from error
        except (OSError, EOFError) as error:
            raise dropped(self.where, error) from error

    def close(self) -> None:
        """Do nothing: every command has a connection of its own."""

    def _answer(self, transport: "AdbConnection") -> Answer:
        """Read packets of the shell protocol: one byte of kind, four of length, the data."""
        texts = {STDOUT: bytearray(), STDERR: bytearray()}
        while True:
            header = transport.read_exact(5)
            kind, length = header[0], int.from_bytes(header[1:], "little")
            if length + sum(map(len, texts.values())) > MAX_ANSWER_BYTES:
                raise too_much(self.where)
            data = transport.read_exact(length)
            if kind == EXIT and data:
                output, errors = (text.decode(errors="replace") for text in texts.values())
                return Answer(data[0], output, errors)
            if kind in texts:
                texts[kind] += data

    def _refusal(self, error: Exception) -> RequestError:
        said = str(error)
        step = next((step for sign, step in STEPS.items() if sign in said), "see what adb devices prints")
        return RequestError("the phone cannot be reached", where=self.where, got=shown(said), next_step=step)


class _Pieces:
    """A file as adbutils reads it, a piece at a time; each is counted when the next is asked for."""

    def __init__(self, source: BinaryIO, advance: Advance) -> None:
        self._left = b""
        self._pieces = pieces(source, advance)

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, none at the end."""
        self._left = self._left or next(self._pieces, b"")
        given, self._left = self._left[:size], self._left[size:]
        return given


def _server() -> tuple[str, int]:
    """Return host and port of the adb server that the environment names, once it has answered.

    adbutils would start one of its own.

    Raises:
        RequestError: none answers.
    """
    host = os.environ.get("ANDROID_ADB_SERVER_HOST", "127.0.0.1")
    named = os.environ.get("ANDROID_ADB_SERVER_PORT", str(DEFAULT_PORT))
    try:
        port = int(named)
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise RequestError(
            "no adb server answers", where=f"{host}:{named}", got=error,
            next_step="start it with adb start-server (Android's platform-tools, or Debian's package adb)",
        ) from error  # fmt: skip
    return host, port
