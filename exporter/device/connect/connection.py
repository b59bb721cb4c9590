"""Connections to devices: run shell commands and send files. Answers are untrusted, so they are bounded and checked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol
from urllib.parse import SplitResult, urlsplit

from exporter.device.connect.shell import Line
from exporter.foundation.config_files import shown
from exporter.foundation.errors import RequestError, did_you_mean

MAX_ANSWER_BYTES = 4 << 20
CHUNK_BYTES = 64 << 10
SCHEMES = ("adb", "ssh")
FORMS = "expected ssh://user@host[:port] or adb://serial"

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Address:
    """The address of a device as given by the user.

    Attributes:
        text: The text the user wrote.
        scheme: `ssh` or `adb`.
        host: Host name or address; for adb the case-sensitive serial.
        user: Login name; None leaves it to the configuration.
        port: TCP port; None leaves it to the configuration.
    """

    text: str
    scheme: str
    host: str
    user: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class ShellResult:
    """The result of a command: its exit status as in a shell (128 and more: a signal), and its output."""

    code: int
    output: str
    errors: str

    @property
    def last_words(self) -> str:
        """The last line of its error output, or its exit status."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return shown(lines[-1]) if lines else f"exit status {self.code}"


class DroppedError(RequestError):
    """The connection to a device broke off."""


class Running(Protocol):
    """A command that runs until its input ends.

    Attributes:
        said: Its first line of output; empty if it ended without one.
    """

    said: str

    def end(self, timeout_s: float) -> ShellResult:
        """End its input, wait for it, and return its result without `said`; raises like `Connection.run`."""


class Connection(Protocol):
    """A connection to a device.

    Attributes:
        where: The device as named by the user.
    """

    where: str

    @property
    def parent(self) -> Line:
        """The default parent of the exporter's folders."""

    def run(self, command: Line, timeout_s: float) -> ShellResult:
        """Run a line of POSIX shell on the device with empty input.

        Raises:
            DroppedError: the connection broke off.
            RequestError: it did not end within `timeout_s`, or printed more than `MAX_ANSWER_BYTES`.
        """

    def start(self, command: Line, timeout_s: float) -> Running:
        """Start a line of POSIX shell, and return once it has printed a line or ended; raises like `run`.

        Its input ends with `Running.end`, with the connection, or with this process, however that ends.
        """

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Write a file on the device.

        Args:
            source: Its bytes.
            target: Absolute path on the device.
            advance: Called with the number of bytes of each piece sent.

        Raises:
            DroppedError: the connection broke off.
            RequestError: the device could not write the file.
        """

    def close(self) -> None:
        """End the connection."""


def address_of(text: str) -> Address:
    """Parse the value of `--on`.

    Raises:
        RequestError: it is not a device address.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise RequestError("this is no address of a device", where=shown(text), got=error, next_step=FORMS) from None
    if parts.scheme not in SCHEMES:
        advice = did_you_mean(parts.scheme, SCHEMES)
        raise RequestError("this is no way to a device", where=shown(text), next_step=f"{FORMS}; {advice}")
    wrong = _wrong(parts)
    if wrong or not text.isprintable():
        raise RequestError("this is no address of a device", where=shown(text), got=wrong, next_step=FORMS)
    if parts.scheme == "adb":
        return Address(text, "adb", parts.netloc)
    return Address(text, "ssh", parts.hostname or "", parts.username, port)


def _wrong(parts: SplitResult) -> str | None:
    if parts.password is not None:
        return "a password, which other users of this machine could see"
    if not parts.hostname or " " in parts.netloc:
        return "no host" if parts.scheme == "ssh" else "no serial"
    if parts.path.strip("/") or parts.query or parts.fragment:
        return f"more than a host: {shown(parts.path or parts.query or parts.fragment)}"
    return None


def ignored(_: int) -> None:
    """Ignore progress."""


def pieces(source: BinaryIO, advance: Advance) -> Iterator[bytes]:
    """Yield a file in pieces; each is counted when the next is requested."""
    while piece := source.read(CHUNK_BYTES):
        yield piece
        advance(len(piece))


def too_much(where: str) -> RequestError:
    """Return the error for a device that prints too much."""
    return RequestError(
        "the device printed more than an answer has", where=where, expected=f"at most {MAX_ANSWER_BYTES:,} bytes"
    )


def too_long(where: str, timeout_s: float) -> RequestError:
    """Return the error for a device that does not finish."""
    return RequestError(
        "the device did not finish", where=where, expected=f"an answer within {timeout_s:,.0f} s",
        next_step="measure less with --prompt, --generate, --repeats or --sustain",
    )  # fmt: skip


def dropped(where: str, cause: object) -> DroppedError:
    """Return the error for a dropped connection."""
    return DroppedError(
        "the connection to the device was dropped", where=where, got=shown(str(cause)),
        next_step="check its cable, network and power, and run the command again",
    )  # fmt: skip
