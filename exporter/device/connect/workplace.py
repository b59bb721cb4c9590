"""A folder of ours on a device: made, filled with what is not there yet, checked byte by byte, and removed again."""

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from exporter.device.connect.connection import Advance, Answer, Connection, DroppedError
from exporter.errors import InputError, RequestError

SHORT_S = 30
HASH_S = 600
# What file systems need beside the bytes themselves.
SPARE_BYTES = 1 << 20
PID = "pid"
NO_SPACE = "delete something there, or name a folder with more room with --folder"


@dataclass(frozen=True)
class Parcel:
    """A file to have on the device.

    Attributes:
        source: The file here.
        name: Its path below the folder there.
        size: Its bytes.
        sha256: In hex.
    """

    source: Path
    name: str
    size: int
    sha256: str


class Workplace:
    """A folder on a device that belongs to one bundle.

    Args:
        connection: To the device.
        path: Absolute path of the folder there.
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self.connection = connection
        self.path = path

    def run(self, command: str, timeout_s: float = SHORT_S) -> Answer:
        """Run a line of shell in the folder; see `Connection.run`."""
        return self.connection.run(f"cd {shlex.quote(self.path)} && {command}", timeout_s)

    def work(self, command: str, timeout_s: float) -> Answer:
        """Run a program in the folder and note its number, by which `leave` ends it if it still runs then."""
        answer = self.run(f"echo $$ > {PID} && exec {command}", timeout_s)
        self.run(f"rm -f {PID}")
        return answer

    def fill(self, parcels: list[Parcel], advance: Advance) -> int:
        """Send what the folder does not hold yet and check all of it; return the bytes sent.

        Raises:
            RequestError: no room, or the connection broke off.
            InputError: what arrived is not what was sent.
        """
        there = self._digests(parcels)
        missing = [parcel for parcel in parcels if there.get(parcel.name) != parcel.sha256]
        needed = sum(parcel.size for parcel in missing)
        self._require_room(needed)
        self._make_folders(missing)
        for parcel in missing:
            self._send(parcel, advance)
        self._check(missing)
        return needed

    def _send(self, parcel: Parcel, advance: Advance) -> None:
        try:
            with parcel.source.open("rb") as source:
                self.connection.send(source, f"{self.path}/{parcel.name}", advance)
        except DroppedError:
            raise
        except RequestError as error:
            self._require_room(parcel.size, error)
            raise

    def _require_room(self, needed: int, cause: RequestError | None = None) -> None:
        """Refuse where the folder's disk has no room; `cause` is what failed for want of it."""
        answer = self.run("df -Pk .")
        found = re.search(r"\s(\d{1,15})\s+\d{1,3}%\s", answer.output)
        free = int(found[1]) * 1024 if found else None
        full = cause is not None and re.search("No space left|File too large|exceeded|exit status 153", str(cause))
        if full or (free is not None and free < needed + SPARE_BYTES):
            room = "" if free is None else f"{free:,} bytes free"
            raise RequestError(
                "the device has no room for the bundle" if cause is None else "the device ran out of room",
                where=f"{self.connection.where}, {self.path}",
                got=room or None if cause is None else ", ".join(filter(None, (str(cause).rstrip("."), room))),
                expected=f"{needed + SPARE_BYTES:,} bytes", next_step=NO_SPACE,
            ) from cause  # fmt: skip

    def _make_folders(self, parcels: list[Parcel]) -> None:
        folders = sorted({parcel.name.rpartition("/")[0] for parcel in parcels} - {""})
        if folders:
            self.run("umask 077; mkdir -p " + " ".join(map(shlex.quote, folders)))

    def _check(self, parcels: list[Parcel]) -> None:
        there = self._digests(parcels)
        for parcel in parcels:
            if there.get(parcel.name) != parcel.sha256:
                raise InputError(
                    "the file on the device is not the one that was sent",
                    where=f"{self.connection.where}, {self.path}/{parcel.name}",
                    got=there.get(parcel.name, "no SHA-256"), expected=parcel.sha256,
                    next_step="run it again; if it stays so, check the device's storage",
                )  # fmt: skip

    def _digests(self, parcels: list[Parcel]) -> dict[str, str]:
        """Return the SHA-256 of those of the files that are there."""
        names = " ".join(shlex.quote(parcel.name) for parcel in parcels)
        # macOS has shasum; missing files are said on the error stream and make the status useless.
        command = f"{{ sha256sum {names} 2>/dev/null || shasum -a 256 {names} 2>/dev/null; }}; true"
        lines = self.run(command, HASH_S).output.splitlines()
        found = filter(None, (re.fullmatch(r"([0-9a-f]{64})[ *]+(.+)", line.strip()) for line in lines))
        return {match[2]: match[1] for match in found}

    def leave(self, keep: bool) -> bool:
        """End what still runs in the folder and, unless it is to be kept, delete it; return whether that went well."""
        inner, outer = shlex.quote(self.path), shlex.quote(self.path.rpartition("/")[0])
        end = f'[ -f {inner}/{PID} ] && kill -9 "$(cat {inner}/{PID})" 2>/dev/null; rm -f {inner}/{PID}'
        delete = "true" if keep else f"rm -rf {inner} && {{ rmdir {outer} 2>/dev/null; true; }}"
        return self.connection.run(f"{end}; {delete}", SHORT_S).code == 0


@contextmanager
def workplace(connect: Callable[[], Connection], name: str, parent: str | None, keep: bool) -> Iterator[Workplace]:
    """Yield a folder on a device, and delete it afterwards whatever happens; over a new connection if need be.

    Args:
        connect: Reaches the device.
        name: Of the folder.
        parent: Folder there that ours goes into; None takes the transport's.
        keep: Leave the folder, so that the next time only what changed is sent.

    Raises:
        RequestError: the device is not to be reached, or lets no folder be made.
    """
    connection = connect()
    place: Workplace | None = None
    try:
        place = _made(connection, name, parent)
        yield place
    except DroppedError as error:
        if place is None or _left_anew(connect, place.path, keep):
            raise
        raise DroppedError(f"{str(error).rstrip('.')}; its folder {place.path} may be left there") from error
    finally:
        if place is not None:
            with contextlib.suppress(RequestError):
                place.leave(keep)
        connection.close()


def _made(connection: Connection, name: str, parent: str | None) -> Workplace:
    above = f"{connection.parent if parent is None else shlex.quote(parent)}/edge-exporter"
    inner = f"{above}/{shlex.quote(name)}"
    answer = connection.run(f"umask 077; mkdir -p {inner} && cd {inner} && [ -O . ] && [ -w . ] && pwd", SHORT_S)
    path = answer.output.removesuffix("\n")
    if answer.code or not path.startswith("/") or not path.endswith(f"/edge-exporter/{name}") or not path.isprintable():
        raise RequestError(
            "no folder can be made on the device", where=connection.where, got=answer.last_words,
            expected="one of this user's own", next_step="name a folder that you may write to with --folder",
        )  # fmt: skip
    return Workplace(connection, path)


def _left_anew(connect: Callable[[], Connection], path: str, keep: bool) -> bool:
    try:
        connection = connect()
    except RequestError:
        return False
    try:
        return Workplace(connection, path).leave(keep)
    except RequestError:
        return False
    finally:
        connection.close()
