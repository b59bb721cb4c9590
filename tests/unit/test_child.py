"""Child processes: errors pass, crashes are told, nothing lives on."""

import os
import signal

import psutil
import pytest

from exporter.child import Child
from exporter.errors import InputError, RuntimeCrashError


class Worker:
    """Serves calls that go right and wrong."""

    serves = True

    def double(self, number: int) -> int:
        return 2 * number

    def refuse(self) -> None:
        raise InputError("it is bad", where="here", got=1, expected=2, next_step="mend it")

    def fail(self) -> None:
        raise ValueError("a plain error")

    def die(self) -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def test_calls_errors_and_crashes() -> None:
    with Child("worker", Worker) as child:
        assert child.call("double", 21) == 42
        with pytest.raises(InputError, match="here: it is bad; got 1, expected 2; mend it") as caught:
            child.call("refuse")
        assert caught.value.exit_code == 3
        with pytest.raises(RuntimeCrashError, match="ValueError: a plain error"):
            child.call("fail")
        assert child.call("double", 1) == 2
        with pytest.raises(RuntimeCrashError, match="worker died in its child process; got signal SIGKILL: last words"):
            child.call("die")


def test_closing_ends_the_process() -> None:
    with Child("worker", Worker) as child:
        child.result()
        process = psutil.Process(child.process_id)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
