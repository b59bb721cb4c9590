"""Phones, through the adb server of this machine and adbutils. The server is the user's: it is not started here."""

import contextlib
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
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
    from adbutils import AdbConnection

DEFAULT_PORT = 5037
CONNECT_S, SEND_STALL_S = 3, 60
FILE_MODE = stat.S_IFREG | 0o700
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
        self.where, self._serial = address.text, address.host
        host, port = _server()
        from adbutils import AdbClient
        from adbutils.errors import AdbError, AdbTimeout

        self._failure, self._late = AdbError, AdbTimeout
        self._client = AdbClient(host, port)
        try:
            with self._service(f"host-serial:{self._serial}:features", timeout_s=CONNECT_S) as link:
                features = link.read_string_block().split(",")
        except (AdbError, OSError) as error:
            raise self._refusal(error) from error
        if SHELL_V2 not in features:
            raise RequestError("the phone's adb is too old", where=self.where, expected="Android 7 or newer")

    def run(self, command: str, timeout_s: float) -> Answer:
        """Run a line of shell there; see `Connection.run`."""
        try:
            with self._service(*self._transport, f"shell,v2,raw:{command}", timeout_s=timeout_s) as link:
                return self._answer(link)
        except (self._late, TimeoutError) as error:
            raise too_long(self.where, timeout_s) from error
        except (self._failure, OSError, EOFError) as error:
            raise dropped(self.where, error) from error

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Write a file there; see `Connection.send`."""
        try:
            with self._service(*self._transport, "sync:", timeout_s=SEND_STALL_S) as link:
                # The phone says why before it stops listening.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for packet in _packets(source, target, advance):
                        link.conn.sendall(packet)
                status, length = link.read_exact(4), int.from_bytes(link.read_exact(4), "little")
                said = link.read_exact(min(length, MAX_ANSWER_BYTES)).decode(errors="replace")
        except (self._failure, OSError, EOFError) as error:
            raise dropped(self.where, error) from error
        if status != b"OKAY":
            raise RequestError("the device could not write the file", where=target, got=shown(said))

    @property
    def _transport(self) -> list[str]:
        return [f"host:transport:{self._serial}"]

    @contextlib.contextmanager
    def _service(self, *requests: str, timeout_s: float) -> "Iterator[AdbConnection]":
        """Yield a connection on which each request was answered with OKAY."""
        with self._client.make_connection(timeout=timeout_s) as link:
            for request in requests:
                link.send_command(request)
                link.check_okay()
            yield link

    def close(self) -> None:
        """Do nothing: every command has a connection of its own."""

    def _answer(self, link: "AdbConnection") -> Answer:
        """Read packets of the shell protocol: one byte of kind, four of length, the data."""
        texts = {STDOUT: bytearray(), STDERR: bytearray()}
        while True:
            header = link.read_exact(5)
            kind, length = header[0], int.from_bytes(header[1:], "little")
            if length + sum(map(len, texts.values())) > MAX_ANSWER_BYTES:
                raise too_much(self.where)
            data = link.read_exact(length)
            if kind == EXIT and data:
                output, errors = (text.decode(errors="replace") for text in texts.values())
                return Answer(data[0], output, errors)
            if kind in texts:
                texts[kind] += data

    def _refusal(self, error: Exception) -> RequestError:
        said = str(error)
        step = next((step for sign, step in STEPS.items() if sign in said), "see what adb devices prints")
        return RequestError("the phone cannot be reached", where=self.where, got=shown(said), next_step=step)


def _packets(source: BinaryIO, target: str, advance: Advance) -> Iterator[bytes]:
    """Yield what sends a file by adb's sync: its name and mode, its data, and the time that it gets."""
    name = f"{target},{FILE_MODE}".encode()
    yield b"SEND" + struct.pack("<I", len(name)) + name
    for piece in pieces(source, advance):
        yield b"DATA" + struct.pack("<I", len(piece)) + piece
    yield b"DONE" + struct.pack("<I", int(time.time()))


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
