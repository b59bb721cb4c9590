"""The main loop of a child process: gives up the network, then answers requests one by one."""

import importlib
import operator
import time
from collections.abc import Callable
from typing import Any, get_type_hints

from exporter.child.limits import end_with, leave_no_core, limit_cpu, limit_memory
from exporter.child.messages import MESSAGE_CHARACTERS, Arrays, Json, Room, kind_of, receive, send
from exporter.child.network import cut_network
from exporter.foundation.errors import ExporterError, RuntimeCrashError

# Large limits, since the parent is trusted and the memory of this process is limited.
REQUEST = Room(header=1 << 30, arrays=1 << 33)


def serve(descriptor: int, parent: int, memory_bytes: int) -> None:
    """Answer requests until the pipe is closed.

    Args:
        descriptor: This end of the pipe.
        parent: Process id of the parent.
        memory_bytes: Memory limit beyond the libraries that the first request loads.
    """
    end_with(parent)
    cut_network()
    leave_no_core()
    server = _Server(memory_bytes)
    while True:
        try:
            header, arrays = receive(descriptor, REQUEST)
            send(descriptor, *server.answer(header, arrays))
        except (EOFError, OSError):
            return


def cpu_seconds() -> float:
    """Return the CPU time used by all threads of this process."""
    return time.process_time()


class _Server:
    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._limited = False
        self._made: object = None

    def answer(self, request: Json, arrays: Arrays) -> tuple[Json, Arrays]:
        """Return a message with the requested result, or an error."""
        try:
            limit_cpu(request["seconds"])
            return self._done(request, arrays)
        except ExporterError as error:
            return _failed(error)
        except MemoryError:
            allowed = f"{self._memory_bytes >> 20:,} MiB"
            return _failed(
                RuntimeCrashError(f"it needs more memory than the {allowed} that its child process may take")
            )
        except Exception as error:
            return _failed(RuntimeCrashError(f"{type(error).__name__}: {error}".rstrip(".")))

    def _done(self, request: Json, arrays: Arrays) -> tuple[Json, Arrays]:
        function, answered = self._function(request["module"], request["name"]), Arrays()
        makes = isinstance(function, type)
        hints = get_type_hints(function.__init__ if makes else function)
        given = {name: kind_of(hints[name]).unpack(data, arrays) for name, data in request["arguments"].items()}
        value = function(**given)
        if makes:
            self._made, value = value, None
        return {"value": kind_of(None if makes else hints["return"]).pack(value, answered)}, answered

    def _function(self, module: str | None, name: str) -> Callable[..., Any]:
        """Return a method of the child's object, or a function or class of a module."""
        if module is None:
            method: Callable[..., Any] = getattr(self._made, name)
            return method
        function: Callable[..., Any] = operator.attrgetter(name)(importlib.import_module(module))
        if not self._limited:
            limit_memory(self._memory_bytes)
            self._limited = True
        return function


def _failed(error: ExporterError) -> tuple[Json, Arrays]:
    return {"error": type(error).__name__, "message": str(error)[:MESSAGE_CHARACTERS]}, Arrays()
