"""Child processes: data goes through and nothing else, crashes and deadlines are told, nothing lives on."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from exporter.child.network import cut_network
from exporter.child.process import ANSWER, Child
from exporter.formats.format import Float32
from exporter.foundation.errors import DeadlineError, InputError, RuntimeCrashError
from tests.taken import ANSWERS, Taken

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
SOON_S = 60.0
ROOM_BYTES = 64 << 20


@dataclass(frozen=True)
class Inner:
    path: Path
    ids: tuple[int, ...]
    kind: Literal["gguf", "onnx"]


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    weights: Mapping[str, Float32]
    pair: tuple[str, float]


class Worker:
    """Answers calls that go right and wrong."""

    def double(self, number: int) -> int:
        return 2 * number

    def same(self, outer: Outer) -> Outer:
        return outer

    def rows(self, count: int, columns: int) -> Float32:
        return np.arange(count * columns, dtype=np.float32).reshape(count, columns)

    def refuse(self) -> None:
        raise InputError("it is bad", where="here", got=1, expected=2, next_step="mend it")

    def fail(self) -> None:
        raise ValueError("a plain error")

    def wait(self) -> None:
        time.sleep(60)

    def spin(self) -> None:
        while True:
            pass

    def fill(self, size: int) -> int:
        return len(b"x" * size)

    def die(self) -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    def begin(self) -> int:
        """Start a process of its own, and return its id."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    def reach(self, family: int, address: Any) -> str:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as made:
                made.settimeout(2)
                made.connect(tuple(address) if isinstance(address, list) else address)
        except OSError as error:
            return str(error)
        return "connected"


@contextmanager
def worker() -> Iterator[Child]:
    with Child("worker", ROOM_BYTES) as child:
        child.make(Worker, SOON_S)
        yield child


def over(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_calls_errors_and_crashes() -> None:
    with worker() as child:
        assert child.call(Worker.double, SOON_S, 21) == 42
        with pytest.raises(InputError, match="here: it is bad; got 1, expected 2; mend it") as caught:
            child.call(Worker.refuse, SOON_S)
        assert caught.value.exit_code == 3
        with pytest.raises(RuntimeCrashError, match="ValueError: a plain error"):
            child.call(Worker.fail, SOON_S)
        assert child.call(Worker.double, SOON_S, number=1) == 2
        with pytest.raises(RuntimeCrashError, match="worker died in its child process; got signal SIGKILL: last words"):
            child.call(Worker.die, SOON_S)
        with pytest.raises(RuntimeCrashError, match="worker died"):
            child.call(Worker.double, SOON_S, 1)


@pytest.mark.parametrize("path", [Path("a b/é"), Path(os.fsdecode(b"\xff\n"))])
def test_values_come_back_as_they_went(path: Path) -> None:
    weights = {"": np.zeros((0, 3), np.float32), "\ud800": np.float32([[1, np.nan], [np.inf, -0.0]])}
    sent = Outer(Inner(path, (1, 2**70), "onnx"), weights, ("\x1b", float("-inf")))
    with worker() as child:
        got = child.call(Worker.same, SOON_S, sent)
        assert child.call(Worker.same, SOON_S, Outer(None, {}, ("", 0.5))) == Outer(None, {}, ("", 0.5))
        large = child.call(Worker.rows, SOON_S, 1000, 2000)
    assert (got.inner, got.pair) == (sent.inner, sent.pair)
    assert {name: (one.shape, one.tobytes()) for name, one in got.weights.items()} == {
        name: (one.shape, one.tobytes()) for name, one in weights.items()
    }
    assert large.flags.writeable and np.array_equal(large, Worker().rows(1000, 2000))


def test_closing_ends_the_process_and_what_it_started() -> None:
    with worker() as child:
        processes = [psutil.Process(child.process_id), psutil.Process(child.call(Worker.begin, SOON_S))]
    psutil.wait_procs(processes, timeout=10)
    assert all(map(over, processes))


@pytest.mark.parametrize("work", [Worker.wait, Worker.spin])
def test_what_takes_too_long_is_ended(work: Callable[[Any], None]) -> None:
    with worker() as child:
        processes = [psutil.Process(child.process_id), psutil.Process(child.call(Worker.begin, SOON_S))]
        with pytest.raises(DeadlineError, match=r"worker did not answer within 0\.2 s, and was ended") as ended:
            child.call(work, 0.2)
        assert ended.value.exit_code == 70
        psutil.wait_procs(processes, timeout=10)
        assert all(map(over, processes))
        with pytest.raises(RuntimeCrashError, match="worker died"):
            child.call(Worker.double, SOON_S, 1)


def test_a_child_that_takes_nothing_is_ended() -> None:
    with worker() as child:
        child.ready()
        os.kill(child.process_id, signal.SIGSTOP)
        with pytest.raises(DeadlineError):
            child.call(Worker.same, 0.3, Outer(None, {"": np.zeros(4 << 20, np.float32)}, ("", 0)))


@linux
def test_memory_is_limited() -> None:
    with worker() as child:
        assert child.call(Worker.fill, SOON_S, ROOM_BYTES // 2) == ROOM_BYTES // 2
        with pytest.raises(RuntimeCrashError, match="it needs more memory than the 64 MiB that its child"):
            child.call(Worker.fill, SOON_S, 2 * ROOM_BYTES)
        assert child.call(Worker.double, SOON_S, 1) == 2


@linux
def test_cpu_time_is_limited_even_where_the_parent_does_not_look() -> None:
    with worker() as child:
        child.ready()
        child._send(None, Worker.spin, {}, {}, 0.2)
        assert child._process.wait(30) == -signal.SIGXCPU


@linux
def test_no_child_reaches_a_network(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named, worker() as child:
        named.bind(path)
        named.listen()
        addresses = {
            socket.AF_INET: list(server.getsockname()),
            socket.AF_INET6: ["::1", 9],
            socket.AF_UNIX: path,
        }
        assert Worker().reach(socket.AF_INET, addresses[socket.AF_INET]) == "connected"
        assert child.run(cut_network, SOON_S) != []
        for family, address in addresses.items():
            assert child.call(Worker.reach, SOON_S, int(family), address) != "connected", family


@linux
def test_a_child_ends_with_its_parent_and_leaves_no_log(tmp_path: Path) -> None:
    program = "from tests.unit import test_child; test_child.spin()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(10)
    assert list(tmp_path.iterdir()) == []


def spin() -> None:
    with worker() as child:
        child.ready()
        print(child.process_id, flush=True)
        child.call(Worker.spin, SOON_S)


def lie(self: Any, how: str) -> Float32:
    """Stand for `Taken.lie`: what was asked for are rows."""
    raise NotImplementedError


SAID = {"nothing": "did not answer", "drops": "did not answer", "part": "got exit code 3", "closed": "a closed pipe"}


@linux
@pytest.mark.parametrize("how", ANSWERS)
def test_what_a_runtime_answers_is_not_trusted(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    with Child("the runtime", ROOM_BYTES) as child:
        child.make(Taken, SOON_S)
        child.ready()
        process = psutil.Process(child.process_id)
        with pytest.raises(RuntimeCrashError, match=SAID.get(how, "answered with something else")) as caught:
            child.call(lie, 1.0 if how in ("nothing", "drops") else SOON_S, how)
        assert over(process)
    sentence = str(caught.value)
    assert len(sentence) < 1000 and sentence.isprintable() and sentence.endswith(".")
    assert time.monotonic() - started < SOON_S
    assert psutil.Process().memory_info().rss - before < 512 << 20
    assert list(tmp_path.iterdir()) == []


def test_an_answer_has_room_for_what_is_asked() -> None:
    assert ANSWER.arrays >= 256 * 262_144 * 4


def test_what_cannot_be_sent_is_a_fault_of_the_caller() -> None:
    with worker() as child:
        with pytest.raises(TypeError, match="cannot be sent"):
            child.call(unsendable, SOON_S)
        assert child.call(Worker.double, SOON_S, 1) == 2


def unsendable(self: Any) -> set[NDArray[Any]]:
    raise NotImplementedError
