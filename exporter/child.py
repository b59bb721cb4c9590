"""Work in a child process: a runtime may abort, and its memory must be its own."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from exporter.errors import DeadlineError, ExporterError, RuntimeCrashError

_spawn = get_context("spawn")

# How often a thread of GNU OpenMP looks whether the others are done before it sleeps. Its default of 300,000 is some
# 10 ms, which on a core that another process wants too is lost at each of a token's hundreds of barriers: llama.cpp on
# two cores, one of them busy, decodes 2.2 times as fast with 1,000, and as fast as ever where both are free.
SPINS = "1000"


class Child:
    """A child process that makes one object (or one result) and answers calls to its methods.

    The child's standard output and error go to a file; its last lines are quoted when the child dies.

    Args:
        title: What runs, for messages: "llama.cpp", "ONNX Runtime".
        factory: A module-level callable.
        *args: Its arguments.
    """

    def __init__(self, title: str, factory: Callable[..., object], *args: object) -> None:
        self.title = title
        self._log = tempfile.NamedTemporaryFile(prefix="edge-exporter-", suffix=".log")  # noqa: SIM115  (closed in close)
        self._pipe, theirs = _spawn.Pipe()
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        self._process = _spawn.Process(target=_serve, args=(theirs, self._log.name, factory, args), daemon=True)
        self._process.start()
        theirs.close()
        self._first: object = None
        self._started = False

    def result(self, timeout_s: float | None = None) -> Any:
        """Return what the factory returned, where that can be sent (else True); raise what it raised.

        Args:
            timeout_s: Seconds after which the child is killed; None for no limit.

        Raises:
            DeadlineError: the child was killed, since it took longer.
        """
        if not self._started:
            self._await(timeout_s)
            self._first = self._receive()
            self._started = True
        return self._first

    def call(self, method: str, *args: object, timeout_s: float | None = None) -> Any:
        """Call a method of the child's object and return its result.

        Args:
            method: Name of the method.
            *args: Its arguments.
            timeout_s: Seconds after which the child is killed; None for no limit.

        Raises:
            ExporterError: what the method raised.
            DeadlineError: the child was killed, since it took longer.
            RuntimeCrashError: the child died.
        """
        self.result()
        try:
            self._pipe.send((method, args))
        except (BrokenPipeError, ConnectionResetError):
            raise self._crash() from None
        self._await(timeout_s)
        return self._receive()

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.pid or 0

    def _await(self, seconds: float | None) -> None:
        if seconds is not None and not self._pipe.poll(seconds):
            self._process.kill()
            raise DeadlineError(f"{self.title} did not answer within {seconds:g} s, and was ended")

    def _receive(self) -> Any:
        try:
            succeeded, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._crash() from None
        if not succeeded:
            raise value
        return value

    def _crash(self) -> RuntimeCrashError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        ended = f"exit code {code}" if code is None or code >= 0 else f"signal {signal.Signals(-code).name}"
        with open(self._log.name, encoding="utf-8", errors="replace") as log:  # noqa: PTH123  (a name, not a path of ours)
            tail = " / ".join(line.strip() for line in log.readlines()[-3:])
        return RuntimeCrashError(
            f"{self.title} died in its child process",
            got=f"{ended}{': ' + tail if tail else ''}",
            expected="an answer",
        )

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(timeout=2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.close()

    def __enter__(self) -> Self:
        """Return the child."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()


def _serve(pipe: Connection, log: str, factory: Callable[..., object], args: tuple[object, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent decides, and closing the pipe ends the child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    served = _answer(pipe, factory, args)
    while served is not None:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        _answer(pipe, getattr(served, method), arguments)


def _answer(pipe: Connection, function: Callable[..., object], args: tuple[object, ...]) -> object:
    """Send what the function returns or raises; return an object that can serve further calls."""
    try:
        value = function(*args)
    except ExporterError as error:
        _send(pipe, False, error)
        return None
    except Exception as error:
        _send(pipe, False, RuntimeCrashError(f"{type(error).__name__}: {error}".rstrip(".")))
        return None
    if hasattr(value, "serves"):
        _send(pipe, True, True)
        return value
    _send(pipe, True, value)
    return None


def _send(pipe: Connection, succeeded: bool, value: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.send((succeeded, value))
