"""Runs work in a child process, since a model may crash or take over a runtime, and its memory must be separate."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Never, ParamSpec, Self, TypeVar, get_type_hints

from exporter.child.messages import (
    MESSAGE_CHARACTERS,
    Arrays,
    Json,
    Kind,
    Room,
    WrongKindError,
    kind_of,
    receive,
    send,
)
from exporter.foundation import errors
from exporter.foundation.errors import DeadlineError, ExporterError, RuntimeCrashError

P = ParamSpec("P")
R = TypeVar("R")

# Spins of a GNU OpenMP thread at a barrier before it sleeps. The default of 300,000 takes about 10 ms. On a core shared
# with another process, this is lost at each of a token's hundreds of barriers. With 1,000, llama.cpp decodes 2.2 times
# as fast on two cores with one of them busy, and equally fast if both are free.
SPINS = "1000"
PROGRAM = "import sys; sys.path[:] = {}; from exporter.child.serve import serve; serve({}, {}, {})"
# Arrays: logits of half a window of 512 tokens, for a vocabulary of 393,216. Header: a text of 10 MB; any header of
# that size takes less than 512 MiB in Python.
ANSWER = Room(header=10 << 20, arrays=384 << 20)
# Time limit for a process to exit after closing its pipe.
DYING_S = 2.0
LOG_BYTES, LOG_LINES = 4096, 3
ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ExporterError)
}


class Child:
    """A child process that makes one object and answers calls to its methods, or runs functions.

    It has no network, ends when this process does, and writes no core dump. The system also kills it when the thread
    that made it ends. Arguments and results must be of kinds supported by `exporter.child.messages`; both sides check
    them against the annotations. Errors of the child are raised as those of `exporter.foundation.errors`. Its standard
    output and error go to an unnamed file, whose last lines are reported if it dies.

    Args:
        title: Name of the runtime for messages: "llama.cpp", "ONNX Runtime".
        memory_bytes: Memory limit beyond the libraries that the first function or class loads.
        folder: Its working directory; by default this process's.
    """

    def __init__(self, title: str, memory_bytes: int, folder: Path | None = None) -> None:
        self.title = title
        self._making_s: float | None = None
        self._ended = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._pipe, theirs = socket.socketpair()
        self._pipe.setblocking(False)
        with theirs:
            # Absolute, since an empty entry stands for the working directory.
            path = (
                [*(str(Path(entry).absolute()) for entry in sys.path)] if folder is not None else [*map(str, sys.path)]
            )
            program = PROGRAM.format(ascii(path), theirs.fileno(), os.getpid(), memory_bytes)
            # In its own process group, so that Ctrl-C reaches only this process, which decides.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", program], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                pass_fds=[theirs.fileno()], env={"GOMP_SPINCOUNT": SPINS} | os.environ, process_group=0,
                cwd=folder,
            )  # fmt: skip

    def make(self, factory: Callable[P, object], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> None:
        """Let the child make the object whose methods are called; `ready` or the first call raises any error.

        Args:
            factory: An importable class.
            deadline_s: Time limit in seconds from when the result is awaited.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.
        """
        # The first argument of __init__, the object itself, exists only in the child.
        arguments = inspect.signature(factory).bind(*args, **kwargs).arguments
        self._send(factory.__module__, factory, get_type_hints(factory.__init__), arguments, deadline_s)
        self._making_s = deadline_s

    def ready(self) -> None:
        """Wait until the object is made.

        Raises:
            ExporterError: the error of its constructor; otherwise as for `call`.
        """
        if self._making_s is not None:
            deadline_s, self._making_s = self._making_s, None
            self._receive(kind_of(None), deadline_s)

    def call(self, method: Callable[Concatenate[Any, P], R], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the child's object and return its result.

        Args:
            method: The method of a class or protocol.
            deadline_s: Seconds after which the child is killed.
            *args: Its positional arguments.
            **kwargs: Its keyword arguments.

        Raises:
            ExporterError: the error that the method raised.
            DeadlineError: the child was killed after the deadline.
            RuntimeCrashError: the child died, or was killed because its answer was of another kind.
        """
        arguments = inspect.signature(method).bind(None, *args, **kwargs).arguments
        # Drop the object itself.
        named = dict(list(arguments.items())[1:])
        return self._answer(None, method, named, deadline_s)

    def run(self, function: Callable[P, R], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run an importable function in the child and return its result; see `call`."""
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        return self._answer(function.__module__, function, arguments, deadline_s)

    @property
    def process_id(self) -> int:
        """The child's process id."""
        return self._process.pid

    def _answer(
        self, module: str | None, function: Callable[..., R], arguments: dict[str, Any], deadline_s: float
    ) -> R:
        self.ready()
        hints = get_type_hints(function)
        expected = kind_of(hints["return"])
        self._send(module, function, hints, arguments, deadline_s)
        result: R = self._receive(expected, deadline_s)
        return result

    def _send(
        self,
        module: str | None,
        function: Callable[..., object],
        hints: dict[str, Any],
        arguments: dict[str, Any],
        deadline_s: float,
    ) -> None:
        arrays = Arrays()
        packed = {name: kind_of(hints[name]).pack(value, arrays) for name, value in arguments.items()}
        name = function.__name__ if module is None else function.__qualname__
        request = {"module": module, "name": name, "arguments": packed, "seconds": deadline_s}
        try:
            send(self._pipe.fileno(), request, arrays, time.monotonic() + deadline_s)
        except TimeoutError:
            self._late(deadline_s)
        except ConnectionError:
            self._crashed()

    def _receive(self, expected: Kind, deadline_s: float) -> Any:
        try:
            header, arrays = receive(self._pipe.fileno(), ANSWER, time.monotonic() + deadline_s)
            if isinstance(header, dict) and header.keys() == {"value"}:
                return expected.unpack(header["value"], arrays)
            error = _error(header)
        except TimeoutError:
            self._late(deadline_s)
        except (EOFError, ConnectionError):
            self._crashed()
        except (WrongKindError, ExporterError) as wrong:
            self._kill()
            raise RuntimeCrashError(
                f"{self.title} answered with something else than it was asked for, and was ended", got=wrong
            ) from None
        raise error

    def _late(self, deadline_s: float) -> Never:
        self._kill()
        raise DeadlineError(f"{self.title} did not answer within {deadline_s:g} s, and was ended") from None

    def _crashed(self) -> Never:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(DYING_S)
        ended = _ended(self._process.returncode)
        # Processes it started may still run.
        self._kill()
        size = os.fstat(self._log.fileno()).st_size
        log = os.pread(self._log.fileno(), LOG_BYTES, max(0, size - LOG_BYTES)).decode("utf-8", "replace")
        tail = " / ".join(line.strip() for line in log.splitlines()[-LOG_LINES:])
        raise RuntimeCrashError(
            f"{self.title} died in its child process",
            got=f"{ended}{': ' + tail if tail else ''}",
            expected="an answer",
        ) from None

    def _kill(self) -> None:
        """Kill the child and all processes of its group."""
        if self._ended:
            # Its id may belong to another process by now.
            return
        self._ended = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._kill()
        self._log.close()

    def __enter__(self) -> Self:
        """Return the child."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()


def _ended(code: int | None) -> str:
    """Describe how a process ended."""
    if code is None:
        return "a closed pipe"
    if code >= 0:
        return f"exit code {code}"
    return f"signal {next((one.name for one in signal.Signals if one == -code), -code)}"


def _error(header: Json) -> ExporterError:
    """Return the error in a child's answer."""
    if isinstance(header, dict) and header.keys() == {"error", "message"}:
        name, message = header["error"], header["message"]
        if isinstance(name, str) and name in ERRORS and isinstance(message, str):
            return ERRORS[name](message[:MESSAGE_CHARACTERS])
    raise WrongKindError("neither a value nor an error")
