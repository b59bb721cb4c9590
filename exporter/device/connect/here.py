"""This machine, as a device that needs no connection."""

import shutil
import subprocess
from pathlib import Path
from typing import BinaryIO

from exporter.device.connect.connection import Advance, Answer, too_long


class Here:
    """Runs commands in processes of this machine."""

    where = "this machine"
    parent = "."

    def run(self, command: str, timeout_s: float) -> Answer:
        """Run a line of shell; see `Connection.run`. The process ends with whatever ends this call."""
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise too_long(self.where, timeout_s) from error
        code = 128 - done.returncode if done.returncode < 0 else done.returncode
        return Answer(code, *(text.decode(errors="replace") for text in (done.stdout, done.stderr)))

    def send(self, source: BinaryIO, target: str, advance: Advance) -> None:
        """Copy a file; see `Connection.send`."""
        with Path(target).open("wb") as written:
            shutil.copyfileobj(source, written)
            advance(written.tell())

    def close(self) -> None:
        """Do nothing."""
