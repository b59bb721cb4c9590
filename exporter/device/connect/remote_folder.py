"""The exporter's folder on a device: created, filled with missing files, verified, and removed again."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from exporter.device.connect.connection import Advance, Connection, DroppedError, Running, ShellResult, ignored
from exporter.device.connect.shell import Line, line
from exporter.foundation.errors import InputError, RequestError

SHORT_S = 30
# Time limits for deleting the remains of a killed measurement, and for hashing files.
SWEEP_S, HASH_S = 120, 600
MAX_PATH = 1024
# Space that file systems need beyond the file contents.
SPARE_BYTES = 1 << 20
NO_SPACE = "delete something there, or name a folder with more room with --folder"
# Subfolders on the device: programs, and read-only data.
PROGRAM, BUNDLE = "program", "bundle"

# Creates a folder on the device and keeps it until the script's input ends. The input ends with the connection or with
# this process, however they end. The script then kills any program still running in the folder, and deletes the folder.
# It prints its process id and the path. Its arguments are the parent folder, the folder's name, `keep` if the folder
# stays, and the process id of an earlier instance that lost its connection.
#
# A folder belongs to one process. Each process creates a mark next to it, NAME.HOST.PID, and then looks for the marks
# of others, so of two processes at least one sees the other and gives way. A mark is valid while its process lives, or
# forever if it belongs to another host that shares the disk. A folder without an owner was left by a device that lost
# power; it is deleted unless it was meant to stay.
HOLD = Line("""
umask 077
trap '' HUP INT PIPE
unset CDPATH
start=$(pwd) above=$1/edge-exporter wanted=$2 keep=$3 former=$4
host=$(uname -n)
me=$host.$$
ours() {  # whether a number is of a process that was started with a path of ours: numbers come again
  kill -0 "$1" && { grep -q edge-exporter "/proc/$1/cmdline" || ps -o args= -p "$1" | grep -q edge-exporter; }
} 2>/dev/null
stop() {  # end the program that runs in a folder, and what it has started
  [ -f "$1/pid" ] && read -r pid < "$1/pid" && ours "$pid" && { kill -9 "-$pid" 2>/dev/null || kill -9 "$pid"; }
  rm -f "$1/pid"
}
take() {  # get a folder's name for ourselves alone
  true > "$1.$me" || return 1
  for other in "$1".*; do
    rest=${other#"$1".}
    [ "$rest" = "$me" ] && continue
    if [ "${rest%.*}" != "$host" ] || ours "${rest##*.}"; then rm -f "$1.$me"; return 1; fi
    rm -f "$other"
  done
  stop "$1"
}
enter() {  # go to the folder above, which goes with the last folder in it: perhaps just now
  cd -- "$start" && mkdir -p -- "$above" && cd -- "$above" && [ -O . ] && [ -w . ] || return 1
  for number in "" -2 -3 -4; do name=$wanted$number; take "$name" && return; done
  echo "others measure this bundle there" >&2
  return 1
}
[ -n "$former" ] && ours "$former" && kill -9 "$former" && sleep 1
enter || enter || { sleep 1; enter; } || exit 1
for found in bench-*; do
  old=${found%%.*}
  if [ -e "$found" ] && [ "$old" != "$name" ] && take "$old"; then
    [ -e "$old/kept" ] || rm -rf "$old"
    rm -f "$old.$me"
  fi
done
mkdir -p "$name" && echo "$$ $(pwd)/$name" && while read -r _; do :; done
stop "$name"
if [ -n "$keep" ]; then true > "$name/kept"; else rm -rf "$name"; fi
code=$?
rm -f "$name.$me"
cd .. && rmdir edge-exporter 2>/dev/null
exit $code
""")


@dataclass(frozen=True)
class Upload:
    """A file to upload to the device.

    Attributes:
        source: The local file.
        name: Its path below the folder on the device.
        size: Its bytes.
        sha256: SHA-256 in hex.
    """

    source: Path
    name: str
    size: int
    sha256: str


class RemoteFolder:
    """A folder on a device, for this process only.

    Args:
        connection: Connection to the device.
        path: Absolute path of the folder on the device.
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self.connection = connection
        self.path = path

    def run(self, command: Line, timeout_s: float = SHORT_S) -> ShellResult:
        """Run a shell line in the folder; see `Connection.run`."""
        return self.connection.run(line("cd -- %s && { %s; }", self.path, command), timeout_s)

    def work(self, command: Line, timeout_s: float) -> ShellResult:
        """Run a program in the folder, recording its process id so that it can be killed when the folder is deleted.

        Args:
            command: The program and its arguments, one of them a path in the folder.
            timeout_s: Time limit in seconds.
        """
        answer = self.run(line("echo $$ > pid && exec %s", command), timeout_s)
        self.run(Line("rm -f pid"))
        return answer

    def write(self, name: str, data: bytes) -> str:
        """Write a file below the folder and return its path on the device; raises like `Connection.send`."""
        path = f"{self.path}/{name}"
        self.connection.send(BytesIO(data), path, ignored)
        return path

    def fill(self, uploads: list[Upload], advance: Advance) -> int:
        """Send and verify the files that the folder does not hold yet; return the bytes sent.

        Raises:
            RequestError: there is no room, or the connection broke off.
            InputError: a file on the device differs from the one sent.
        """
        there = self._digests(uploads)
        missing = [upload for upload in uploads if there.get(upload.name) != upload.sha256]
        needed = sum(upload.size for upload in missing)
        self._require_room(needed)
        self._make_folders(missing)
        for upload in missing:
            self._send(upload, advance)
        self._check(missing)
        return needed

    def _send(self, upload: Upload, advance: Advance) -> None:
        try:
            with upload.source.open("rb") as source:
                self.connection.send(source, f"{self.path}/{upload.name}", advance)
        except DroppedError:
            raise
        except RequestError as error:
            self._require_room(upload.size, error)
            raise

    def _require_room(self, needed: int, cause: RequestError | None = None) -> None:
        """Raise an error if the folder's disk has no room; `cause` is an error that this may explain."""
        answer = self.run(Line("df -Pk ."))
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

    def _make_folders(self, uploads: list[Upload]) -> None:
        folders = sorted({upload.name.rpartition("/")[0] for upload in uploads} - {""})
        if folders:
            self.run(line("umask 077; mkdir -p -- %s", folders))

    def _check(self, uploads: list[Upload]) -> None:
        there = self._digests(uploads)
        for upload in uploads:
            if there.get(upload.name) != upload.sha256:
                raise InputError(
                    "the file on the device is not the one that was sent",
                    where=f"{self.connection.where}, {self.path}/{upload.name}",
                    got=there.get(upload.name, "no SHA-256"), expected=upload.sha256,
                    next_step="run it again; if it stays so, check the device's storage",
                )  # fmt: skip

    def _digests(self, uploads: list[Upload]) -> dict[str, str]:
        """Return the SHA-256 of the files that exist on the device."""
        # macOS has shasum. Prints one line per file, empty if the file does not exist.
        command = line(
            'for file in %s; do { sha256sum < "$file" || shasum -a 256 < "$file" || echo; } 2>/dev/null; done',
            [upload.name for upload in uploads],
        )
        lines = self.run(command, HASH_S).output.splitlines()
        found = {upload.name: re.match(r"[0-9a-f]{64}\b", said) for upload, said in zip(uploads, lines, strict=False)}
        return {name: match[0] for name, match in found.items() if match}


@dataclass(frozen=True)
class _Held:
    """A folder that exists on a device while `running` runs; `process` is its process id on the device."""

    place: RemoteFolder
    running: Running
    process: str


@contextmanager
def remote_folder(
    connect: Callable[[], Connection], name: str, parent: str | None, keep: bool
) -> Iterator[RemoteFolder]:
    """Yield a folder on a device, and always delete it afterwards, over a new connection if necessary.

    If this process is killed or the connection is cut, the device deletes the folder itself.

    Args:
        connect: Connects to the device.
        name: Name of the folder, `bench-` and letters or digits.
        parent: Parent folder on the device; None uses the transport's default.
        keep: Keep the folder, so that only changes are sent next time.

    Raises:
        RequestError: the device cannot be reached, or the folder cannot be created.
    """
    connection = connect()
    held: _Held | None = None
    try:
        held = _hold(connection, name, parent, keep)
        yield held.place
    except DroppedError as error:
        if held is not None and not _left_anew(connect, name, parent, keep, held):
            said = f"{str(error).rstrip('.')}; its folder {held.place.path} goes when the device notices it"
            raise DroppedError(f"{said}, or with the next measurement there") from error
        raise
    finally:
        if held is not None:
            with suppress(RequestError):
                held.running.end(SWEEP_S)
        connection.close()


def _hold(connection: Connection, name: str, parent: str | None, keep: bool, former: str = "") -> _Held:
    """Create a folder; `former` is the process id of its unreachable earlier holder on the device."""
    above = connection.parent if parent is None else parent
    command = line("set -- %s %s %s %s\n%s", above, name, "keep" if keep else "", former, HOLD)
    running = connection.start(command, SWEEP_S)
    found = re.fullmatch(rf"(\d{{1,10}}) (/.*/edge-exporter/{name}(?:-\d)?)", running.said)
    if not found or len(found[2]) > MAX_PATH or not found[2].isprintable():
        raise RequestError(
            "no folder can be made on the device", where=connection.where, got=running.end(SWEEP_S).last_words,
            expected="one of this user's own", next_step="name a folder that you may write to with --folder",
        )  # fmt: skip
    return _Held(RemoteFolder(connection, found[2]), running, found[1])


def _left_anew(connect: Callable[[], Connection], name: str, parent: str | None, keep: bool, held: _Held) -> bool:
    """Take over a folder with a new connection, and release it."""
    try:
        connection = connect()
    except RequestError:
        return False
    try:
        return _hold(connection, name, parent, keep, held.process).running.end(SWEEP_S).code == 0
    except RequestError:
        return False
    finally:
        connection.close()
