"""An adb server with one phone behind it, which speaks the real protocol on the loopback.

A request is four hexadecimal digits of length and a text; the answer OKAY, or FAIL with a text. A shell answers in
packets of one byte of kind, four of length and the data; sync speaks in words of four letters and a length.
"""

import contextlib
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = "/data/local/" + "tmp"
SERIAL = "R5CT1234567"
# Android's programs, as far as they are asked for. llama-bench answers in its own shape, with what it was asked.
GETPROP = '#!/bin/sh\n[ "$1" = ro.product.model ] && echo "SM-S928B"\n'
DUMPSYS = """#!/bin/sh
echo "Current temperatures from HAL:"
echo "	Temperature{mValue=41.5, mType=0, mName=CPU0, mStatus=0}"
echo "	Temperature{mValue=33.1, mType=2, mName=BATTERY, mStatus=0}"
"""
LLAMA_BENCH = """#!%s
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert open(options["-m"], "rb").read(4) == b"GGUF"
repeats = int(options["-r"])
row = {
    "build_commit": "abc1234", "build_number": 6500, "cpu_info": "", "gpu_info": "", "backends": "CPU",
    "model_type": "llama ?B Q8_0", "model_size": 1, "model_n_params": 1122432, "n_batch": 2048,
    "n_threads": int(options["-t"]), "test_time": "2026-11-01T12:00:00Z", "flash_attn": False,
}
rows = []
for prompt, generate, speed in ((int(options["-p"]), 0, 250), (0, int(options["-n"]), 25)):
    if prompt or generate:
        samples = [int(1e9 * (prompt + generate) / speed * (1 + i / 1000)) for i in range(repeats)]
        rows.append(row | {"n_prompt": prompt, "n_gen": generate, "n_depth": 0, "samples_ns": samples})
json.dump(rows, sys.stdout)
"""


class AdbServer:
    """The server and its phone, whose files are in a folder.

    Attributes:
        state: `device`, or what is wrong with it.
        features: What its adb can do.
        room: Bytes that a file may have before writing fails; None: no limit.
        trouble: Why it fails.
        cut: Bytes of a file after which the cable is pulled; None: never.
        trickle_s: Seconds between one byte of an answer and the next.
    """

    def __init__(self, folder: Path) -> None:
        self.files, self._programs = folder / "files", folder / "programs"
        for made in (self.files, self._programs):
            made.mkdir(parents=True)
        self.state, self.features = "device", "shell_v2,cmd,stat_v2"
        self.room: int | None = None
        self.cut: int | None = None
        self.trickle_s = 0.0
        self.trouble = b"No space left on device"
        self.put("getprop", GETPROP)
        self.put("dumpsys", DUMPSYS)
        server = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                Session(server, self.rfile, self.wfile).serve()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def put(self, name: str, text: str) -> Path:
        """Put a program on the phone's path."""
        path = self._programs / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    @property
    def left(self) -> list[str]:
        """What of ours is on the phone."""
        return sorted(str(path.relative_to(self.files)) for path in self.files.rglob("edge-exporter*"))

    def mapped(self, text: str) -> str:
        """Return a text of the phone with its folder in place of Android's."""
        return text.replace(ROOT, str(self.files))

    def shell(self, command: str) -> "subprocess.Popen[bytes]":
        """Start a command of the phone's shell, in a session of its own as adbd does."""
        path, pipe = f"{self._programs}:{os.environ['PATH']}", subprocess.PIPE
        return subprocess.Popen(
            ["/bin/sh", "-c", self.mapped(command)], env={"PATH": path}, stdin=pipe, stdout=pipe, stderr=pipe,
            cwd=self.files, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "AdbServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Session:
    """One connection of a client."""

    def __init__(self, server: AdbServer, source: Any, sink: Any) -> None:
        self._server, self._source, self._sink = server, source, sink
        self._one_at_a_time = threading.Lock()

    def serve(self) -> None:
        """Answer requests until the client goes, or a service has ended."""
        answers: list[tuple[str, Callable[[str], bool]]] = [
            ("host:version", self._version),
            (f"host-serial:{SERIAL}:features", self._features),
            (f"host:transport:{SERIAL}", self._transport),
            ("shell,v2,raw:", self._shell),
            ("sync:", self._sync),
        ]
        while length := self._source.read(4):
            request = self._source.read(int(length, 16)).decode()
            answer = next((answer for start, answer in answers if request.startswith(start)), None)
            if answer is None:
                self._fail(f"device '{request.split(':')[1]}' not found" if "serial" in request else "unknown service")
                return
            if self._server.state != "device" and request != "host:version":
                self._fail(f"device {self._server.state}")
                return
            if not answer(request.partition("raw:")[2]):
                return

    def _say(self, data: bytes) -> None:
        self._sink.write(data)
        self._sink.flush()

    def _block(self, text: str) -> bytes:
        return f"{len(text):04x}{text}".encode()

    def _fail(self, text: str) -> None:
        self._say(b"FAIL" + self._block(text))

    def _version(self, _: str) -> bool:
        self._say(b"OKAY" + self._block("0029"))
        return False

    def _features(self, _: str) -> bool:
        self._say(b"OKAY" + self._block(self._server.features))
        return False

    def _transport(self, _: str) -> bool:
        self._say(b"OKAY")
        return True

    def _shell(self, command: str) -> bool:
        self._say(b"OKAY")
        with self._server.shell(command) as process:
            threads = [
                threading.Thread(target=self._feed, args=(process,), daemon=True),
                *(threading.Thread(target=self._tell, args=one) for one in ((1, process.stdout), (2, process.stderr))),
            ]
            for thread in threads:
                thread.start()
            for thread in threads[1:]:
                thread.join()
            code = process.wait()
        self._packet(3, bytes([code if code >= 0 else 128 - code]))
        return False

    def _feed(self, process: "subprocess.Popen[bytes]") -> None:
        """Hand on what the client sends; as adbd does, hang up when it goes without having closed the input."""
        assert process.stdin is not None
        # The session may have ended meanwhile, and its connection with it.
        with contextlib.suppress(OSError, ValueError):
            while header := self._source.read(5):
                kind, length = struct.unpack("<BI", header)
                data = self._source.read(length)
                if kind == 0:
                    process.stdin.write(data)
                elif kind == 4:
                    process.stdin.close()
        if not process.stdin.closed:
            process.send_signal(signal.SIGHUP)
            process.stdin.close()

    def _tell(self, kind: int, stream: Any) -> None:
        while data := stream.read1(1 << 16):
            self._packet(kind, data)

    def _packet(self, kind: int, data: bytes) -> None:
        # A client that has gone hears no more.
        with self._one_at_a_time, contextlib.suppress(OSError, ValueError):
            packet = struct.pack("<BI", kind, len(data)) + data
            for piece in [packet] if not self._server.trickle_s else map(bytes, zip(packet)):
                self._say(piece)
                time.sleep(self._server.trickle_s)

    def _sync(self, _: str) -> bool:
        self._say(b"OKAY")
        while word := self._source.read(4):
            path = self._source.read(struct.unpack("<I", self._source.read(4))[0]).decode()
            if word == b"STAT":
                self._stat(Path(self._server.mapped(path)))
            elif word == b"SEND":
                self._receive(path)
                return False
        return False

    def _stat(self, path: Path) -> None:
        found = path.stat() if path.exists() else None
        facts = (found.st_mode, found.st_size, int(found.st_mtime)) if found else (0, 0, 0)
        self._say(b"STAT" + struct.pack("<III", *facts))

    def _receive(self, named: str) -> None:
        name, _, mode = named.rpartition(",")
        path, received, room = Path(self._server.mapped(name)), 0, self._server.room
        with path.open("wb") as file:
            while self._source.read(4) == b"DATA":
                data = self._source.read(struct.unpack("<I", self._source.read(4))[0])
                received += len(data)
                if self._server.cut is not None and received > self._server.cut:
                    self._server.cut = None
                    return
                # As on a phone, what comes after a failure is read and thrown away.
                if room is None or received <= room:
                    file.write(data)
        self._source.read(4)
        path.chmod(int(mode) & 0o777)
        said = b"" if room is None or received <= room else b"couldn't write file: " + self._server.trouble
        self._say((b"FAIL" if said else b"OKAY") + struct.pack("<I", len(said)) + said)


def llama_bench(path: Path) -> Path:
    """Write a program that answers as llama-bench does."""
    path.write_text(LLAMA_BENCH % sys.executable)
    path.chmod(0o755)
    return path


def free_port() -> int:
    """Return a port on which nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
