"""Work in a child process: a runtime may abort or be taken over by a model, and its memory must be its own."""

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

# How often a thread of GNU OpenMP looks whether the others are done before it sleeps. Its default of 300,000 is some
# 10 ms, which on a core that another process wants too is lost at each of a token's hundreds of barriers: llama.cpp on
# two cores, one of them busy, decodes 2.2 times as fast with 1,000, and as fast as ever where both are free.
SPINS = "1000"
PROGRAM = "import sys; sys.path[:] = {}; from exporter.child.serve import serve; serve({}, {}, {})"
# Logits of half a window of 512 tokens, for a vocabulary of 393,216. A text of 10 MB; what Python makes of a header of
# that size takes less than 512 MiB, whatever it says.
ANSWER = Room(header=10 << 20, arrays=384 << 20)
# What a process that closed its pipe may take to die.
DYING_S = 2.0
LOG_BYTES, LOG_LINES = 4096, 3
ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ExporterError)
}


class Child:
    """A child process that makes one object and answers calls to its methods, or runs functions.

    It has no network, ends when this process does, and writes no core. Arguments and results are data of the kinds
    that `exporter.child.messages` knows, checked on both sides by the annotations; an error of another process's making
    is one of `exporter.foundation.errors`. Its standard output and error go to a file without a name; the last lines
    where it dies. The system ends it with the thread that made it, too.

    Args:
        title: What runs, for messages: "llama.cpp", "ONNX Runtime".
        memory_bytes: Most memory beyond what the libraries take that the first function or class needs.
    """

    def __init__(self, title: str, memory_bytes: int) -> None:
        self.title = title
        self._making_s: float | None = None
        self._ended = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed in close)
        self._pipe, theirs = socket.socketpair()
        self._pipe.setblocking(False)
        with theirs:
            program = PROGRAM.format(ascii([*map(str, sys.path)]), theirs.fileno(), os.getpid(), memory_bytes)
            # In a group of its own: Ctrl-C reaches this process, which decides.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", program], stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                pass_fds=[theirs.fileno()], env={"GOMP_SPINCOUNT": SPINS} | os.environ, process_group=0,
            )  # fmt: skip

    def make(self, factory: Callable[P, object], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> None:
        """Let the child make the object whose methods are called; what that raises, `ready` or the first call raises.

        Args:
            factory: A class of a module.
            deadline_s: Seconds from when it is waited for.
            *args: Its arguments.
            **kwargs: More of them.
        """
        # The object itself, as the first argument of __init__, is the child's.
        arguments = inspect.signature(factory).bind(*args, **kwargs).arguments
        self._send(factory.__module__, factory, get_type_hints(factory.__init__), arguments, deadline_s)
        self._making_s = deadline_s

    def ready(self) -> None:
        """Wait until the object is made.

        Raises:
            ExporterError: what making it raised; else as `call`.
        """
        if self._making_s is not None:
            deadline_s, self._making_s = self._making_s, None
            self._receive(kind_of(None), deadline_s)

    def call(self, method: Callable[Concatenate[Any, P], R], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a method of the child's object and return its result.

        Args:
            method: The method, as its class or a protocol has it.
            deadline_s: Seconds after which the child is killed.
            *args: Its arguments.
            **kwargs: More of them.

        Raises:
            ExporterError: what the method raised.
            DeadlineError: the child was killed, since it took longer.
            RuntimeCrashError: the child died, or answered with something of another kind and was killed.
        """
        arguments = inspect.signature(method).bind(None, *args, **kwargs).arguments
        # Without the object itself.
        named = dict(list(arguments.items())[1:])
        return self._answer(None, method, named, deadline_s)

    def run(self, function: Callable[P, R], deadline_s: float, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function of a module in the child and return its result; see `call`."""
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
        # What it started may go on without it.
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
        """End the child and all that it started."""
        if self._ended:
            # Another process may have its id by now.
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
    """Say how a process ended."""
    if code is None:
        return "a closed pipe"
    if code >= 0:
        return f"exit code {code}"
    return f"signal {next((one.name for one in signal.Signals if one == -code), -code)}"


def _error(header: Json) -> ExporterError:
    """Return the error that a child tells of."""
    if isinstance(header, dict) and header.keys() == {"error", "message"}:
        name, message = header["error"], header["message"]
        if isinstance(name, str) and name in ERRORS and isinstance(message, str):
            return ERRORS[name](message[:MESSAGE_CHARACTERS])
    raise WrongKindError("neither a value nor an error")
