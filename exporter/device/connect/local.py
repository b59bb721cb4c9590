"""This machine, as a device that needs no connection."""

import shutil
import subprocess
from pathlib import Path
from typing import BinaryIO

from exporter.device.connect.connection import MAX_ANSWER_BYTES, Advance, ShellResult, too_long
from exporter.device.connect.shell import Line, line
from exporter.foundation.cache import cache_folder


class Local:
    """Runs commands on this machine, each in its own session, so that Ctrl-C reaches only this process."""

    where = "this machine"

    @property
    def parent(self) -> Line:
        """The user's cache, to which no one else can write."""
        return line("%s", str(cache_folder("bench")))

    def run(self, command: Line, timeout_s: float) -> ShellResult:
        """Run a shell line; see `Connection.run`. The process ends when this call does."""
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise too_long(self.where, timeout_s) from error
        return _answer(done.returncode, done.stdout, done.stderr)

    def start(self, command: Line, timeout_s: float) -> "_Running":
        """Start a shell line; see `Connection.start`."""
        del timeout_s
        return _Running(command)

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Copy a file; see `Connection.send`."""
        with Path(target).open("wb") as written:
            shutil.copyfileobj(source, written)
            advance(written.tell())

    def close(self) -> None:
        """Do nothing."""


class _Running:
    """See `Running`."""

    def __init__(self, command: Line) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        assert self._process.stdout is not None
        self.said = self._process.stdout.readline(MAX_ANSWER_BYTES).decode(errors="replace").removesuffix("\n")

    def end(self, timeout_s: float) -> ShellResult:
        """Wait for the command; see `Running.end`."""
        try:
            output, errors = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            self._process.kill()
            raise too_long(Local.where, timeout_s) from error
        return _answer(self._process.returncode, output, errors)


def _answer(code: int, output: bytes, errors: bytes) -> ShellResult:
    return ShellResult(
        128 - code if code < 0 else code, output.decode(errors="replace"), errors.decode(errors="replace")
    )
