"""Child processes: errors pass, crashes are told, nothing lives on."""

import os
import signal
import sys
import time

import psutil
import pytest

from exporter.child import Child
from exporter.errors import DeadlineError, InputError, RuntimeCrashError
from exporter.memory_limit import memory_limited


class Worker:
    """Serves calls that go right and wrong."""

    serves = True

    def double(self, number: int) -> int:
        return 2 * number

    def refuse(self) -> None:
        raise InputError("it is bad", where="here", got=1, expected=2, next_step="mend it")

    def fail(self) -> None:
        raise ValueError("a plain error")

    def wait(self) -> None:
        time.sleep(60)

    def fill(self) -> str:
        with memory_limited(64 << 20):
            try:
                return f"{len(bytes(256 << 20))} bytes"
            except MemoryError:
                return "refused"

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


def test_what_takes_too_long_is_ended() -> None:
    with Child("worker", Worker) as child:
        assert child.call("double", 1, timeout_s=60) == 2
        process = psutil.Process(child.process_id)
        with pytest.raises(DeadlineError, match=r"worker did not answer within 0\.2 s, and was ended") as ended:
            child.call("wait", timeout_s=0.2)
        assert ended.value.exit_code == 70
        with pytest.raises(RuntimeCrashError, match="worker died"):
            child.call("double", 1)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits address space")
def test_memory_is_limited_for_a_while() -> None:
    with Child("worker", Worker) as child:
        assert child.call("fill") == "refused"
        assert child.call("double", 1) == 2
