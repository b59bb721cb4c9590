"""Connects to phones through adbutils and the adb server of this machine. The user must have started the server."""

import os
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO

from exporter.device.connect.connection import (
    MAX_ANSWER_BYTES,
    Address,
    Advance,
    ShellResult,
    dropped,
    pieces,
    too_long,
    too_much,
)
from exporter.device.connect.shell import Line
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError

if TYPE_CHECKING:
    from adbutils import AdbConnection

DEFAULT_PORT = 5037
CONNECT_S, SEND_STALL_S = 3, 60
FILE_MODE = stat.S_IFREG | 0o700
SHELL_V2 = "shell_v2"
STDOUT, STDERR, EXIT, CLOSE_STDIN = 1, 2, 3, 4
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
        RequestError: no adb server answers, or it does not reach this phone.
    """

    # The only folder that an adb shell may write to and run programs from.
    parent = Line("/data/local/tmp")

    def __init__(self, address: Address) -> None:
        self.where, self._serial = address.text, address.host
        host, port = _server()
        from adbutils import AdbClient
        from adbutils.errors import AdbError, AdbTimeout

        self._failure, self._late = AdbError, AdbTimeout
        self._client = AdbClient(host, port)
        try:
            with closing(self._opened(f"host-serial:{self._serial}:features", timeout_s=CONNECT_S)) as link:
                features = link.read_string_block().split(",")
        except (AdbError, OSError) as error:
            raise self._refusal(error) from error
        if SHELL_V2 not in features:
            raise RequestError("the phone's adb is too old", where=self.where, expected="Android 7 or newer")

    def run(self, command: Line, timeout_s: float) -> ShellResult:
        """Run a shell line on the phone; see `Connection.run`."""
        return self._begun(command, timeout_s).end(timeout_s)

    def start(self, command: Line, timeout_s: float) -> "_Running":
        """Start a shell line on the phone; see `Connection.start`."""
        running = self._begun(command, timeout_s)
        running.hear_a_line(timeout_s)
        return running

    def _begun(self, command: Line, timeout_s: float) -> "_Running":
        with self.failing(timeout_s):
            return _Running(self, self._opened(*self._transport, f"shell,v2,raw:{command}", timeout_s=timeout_s))

    @contextmanager
    def failing(self, timeout_s: float) -> Iterator[None]:
        """Translate the errors of a connection."""
        try:
            yield
        except (self._late, TimeoutError) as error:
            raise too_long(self.where, timeout_s) from error
        except (self._failure, OSError, EOFError) as error:
            raise dropped(self.where, error) from error

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Write a file on the phone; see `Connection.send`."""
        try:
            with closing(self._opened(*self._transport, "sync:", timeout_s=SEND_STALL_S)) as link:
                # The phone sends the reason before it stops listening.
                with suppress(BrokenPipeError, ConnectionResetError):
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

    def _opened(self, *requests: str, timeout_s: float) -> "AdbConnection":
        """Return a connection on which each request was answered with OKAY."""
        link = self._client.make_connection(timeout=timeout_s)
        try:
            for request in requests:
                link.send_command(request)
                link.check_okay()
        except BaseException:
            link.close()
            raise
        return link

    def close(self) -> None:
        """Do nothing, since every command has its own connection."""

    def _refusal(self, error: Exception) -> RequestError:
        said = str(error)
        step = next((step for sign, step in STEPS.items() if sign in said), "see what adb devices prints")
        return RequestError("the phone cannot be reached", where=self.where, got=shown(said), next_step=step)


class _Running:
    """See `Running`. The shell protocol has packets: one byte of kind, four of length, the data."""

    def __init__(self, device: Adb, link: "AdbConnection") -> None:
        self.said = ""
        self._device, self._link = device, link
        self._texts = {STDOUT: bytearray(), STDERR: bytearray()}
        self._code: int | None = None

    def hear_a_line(self, timeout_s: float) -> None:
        """Wait until the command has printed a line or ended."""
        output = self._texts[STDOUT]
        self._read(timeout_s, lambda: b"\n" in output)
        found = output.find(b"\n") + 1
        self.said = output[:found].decode(errors="replace").removesuffix("\n")
        del output[:found]

    def end(self, timeout_s: float) -> ShellResult:
        """Wait for the command; see `Running.end`."""
        with closing(self._link):
            # The command may have ended already.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._link.conn.sendall(struct.pack("<BI", CLOSE_STDIN, 0))
            self._read(timeout_s, lambda: False)
        output, errors = (text.decode(errors="replace") for text in self._texts.values())
        return ShellResult(self._code or 0, output, errors)

    def _read(self, timeout_s: float, enough: Callable[[], bool]) -> None:
        """Read packets until the command has ended or `enough` holds."""
        deadline = time.monotonic() + timeout_s
        with self._device.failing(timeout_s):
            while self._code is None and not enough():
                header = self._exactly(5, deadline)
                kind, length = header[0], int.from_bytes(header[1:], "little")
                if length + sum(map(len, self._texts.values())) > MAX_ANSWER_BYTES:
                    raise too_much(self._device.where)
                data = self._exactly(length, deadline)
                if kind == EXIT and data:
                    self._code = data[0]
                elif kind in self._texts:
                    self._texts[kind] += data

    def _exactly(self, count: int, deadline: float) -> bytes:
        """Return exactly `count` bytes; the deadline covers all of them, however slowly they arrive."""
        read = bytearray()
        while len(read) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._link.conn.settimeout(left)
            piece = self._link.conn.recv(count - len(read))
            if not piece:
                raise EOFError("it closed the connection")
            read += piece
        return bytes(read)


def _packets(source: BinaryIO, target: str, advance: Advance) -> Iterator[bytes]:
    """Yield the packets that send a file with adb's sync: name and mode, data, and modification time."""
    name = f"{target},{FILE_MODE}".encode()
    yield b"SEND" + struct.pack("<I", len(name)) + name
    for piece in pieces(source, advance):
        yield b"DATA" + struct.pack("<I", len(piece)) + piece
    yield b"DONE" + struct.pack("<I", int(time.time()))


def _server() -> tuple[str, int]:
    """Return host and port of the adb server named by the environment, after checking that it answers.

    Otherwise adbutils would start its own server.

    Raises:
        RequestError: no server answers.
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
