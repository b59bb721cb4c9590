"""Processes under limits: real ones, ended, slowed and cut off; and nothing of them is left."""

import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil
import pytest

from exporter.child import network
from exporter.child.network import cut_network
from exporter.child.process import Child
from exporter.emulate.sandbox import confined as confining
from exporter.emulate.sandbox.cgroup import PREFIX, ControlGroup, Controller, Place, control_groups, places
from exporter.emulate.sandbox.confined import Confinement, confined, controlled, hindrance
from exporter.emulate.sandbox.limits import ProcessLimits
from exporter.emulate.sandbox.watch import proportional_bytes, shared_bytes
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import RequestError, RuntimeCrashError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds processes to limits here"),
]
MB = 1_000_000
METHODS = ["watched", "grouped"]
MOST_S, MOST_BYTES = 60.0, 1 << 40
OTHERS = {"unprivileged": 65534}


class Worker:
    """Does to the system what runtimes do, and what they should not."""

    def __init__(self) -> None:
        self._kept: list[object] = []

    def hold(self, size: int) -> int:
        self._kept.append(bytearray(b"x" * size))
        return size

    def map(self, path: Path) -> int:
        with path.open("rb") as file:
            self._kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        return sum(self._kept[-1][::4096])  # type: ignore[index]

    def reserve(self, size: int) -> int:
        self._kept.append(mmap.mmap(-1, size))
        return size

    def cores(self) -> list[int]:
        return sorted(os.sched_getaffinity(0))

    def stand_still(self) -> None:
        time.sleep(10_000)

    def work(self, seconds: float) -> tuple[int, float, float]:
        """Return turns of a loop, CPU seconds, and seconds in all."""
        turns, used, started = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - started < seconds:
            sum(range(2000))
            turns += 1
        return turns, time.process_time() - used, time.perf_counter() - started

    def reach(self, port: int) -> str:
        """Return what a connection to this machine itself says."""
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
        except OSError as error:
            return str(error)
        return "connected"


@contextmanager
def limited(limits: ProcessLimits, method: str) -> Iterator[tuple[Child, Confinement]]:
    """Confine a worker by the watcher and by stopping alone, or in control groups as well."""
    with (
        control_groups(controlled(limits) if method == "grouped" else {}) as groups,
        Child("worker", MOST_BYTES) as child,
        confined(child.process_id, limits, groups) as held,
    ):
        if method == "grouped" and set(held.groups) != set(controlled(limits)):
            pytest.skip("no control group may be made here")
        child.make(Worker, MOST_S)
        yield child, held


@pytest.mark.parametrize("method", METHODS)
def test_too_much_memory_ends_the_process(method: str) -> None:
    with limited(ProcessLimits(memory_bytes=150 * MB), method) as (child, held):
        assert child.call(Worker.hold, MOST_S, 40 * MB) == 40 * MB
        assert not held.out_of_memory
        with pytest.raises(RuntimeCrashError, match="SIGKILL"):
            child.call(Worker.hold, MOST_S, 400 * MB)
        assert held.out_of_memory


def test_a_control_group_alone_ends_it_too() -> None:
    with control_groups({"memory": 100 * MB}) as groups, Child("worker", MOST_BYTES) as child:
        if not groups:
            pytest.skip("no control group may be made here")
        child.make(Worker, MOST_S)
        child.ready()
        assert groups["memory"].add(child.process_id)
        with pytest.raises(RuntimeCrashError, match="SIGKILL"):
            child.call(Worker.hold, MOST_S, 400 * MB)
        assert groups["memory"].killed


@pytest.mark.parametrize("method", METHODS)
def test_mapped_pages_count_and_reserved_ones_do_not(method: str, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20) * 200)
    with limited(ProcessLimits(memory_bytes=150 * MB), method) as (child, held):
        assert child.call(Worker.reserve, MOST_S, 10_000 * MB)
        time.sleep(0.1)
        assert child.call(Worker.hold, MOST_S, MB) == MB
        assert 5 * MB < held.watch.peak_bytes < 60 * MB
        with pytest.raises(RuntimeCrashError):
            child.call(Worker.map, MOST_S, file)
            time.sleep(1)
            child.call(Worker.hold, MOST_S, MB)
        assert held.out_of_memory


def test_pages_of_the_artifact_count_in_full_whoever_else_maps_them(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(1 << 20) * 64)
    worker = Worker()
    worker.map(file)
    with limited(ProcessLimits(), "watched") as (child, _):
        child.call(Worker.map, MOST_S, file)
        shared = shared_bytes(child.process_id, [file])
        assert shared == pytest.approx(32 << 20, rel=0.02)
        assert proportional_bytes(child.process_id) + shared > 64 << 20
        assert shared_bytes(child.process_id, []) == 0


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_what_never_ends_is_ended(method: str, share: float) -> None:
    with limited(ProcessLimits(cpu_share=share, timeout_s=2), method) as (child, held):
        started = time.monotonic()
        with pytest.raises(RuntimeCrashError, match="SIGKILL"):
            child.call(Worker.stand_still, MOST_S)
        assert time.monotonic() - started < 20
        assert (held.watch.ended, held.out_of_memory) == ("time", False)


@pytest.mark.alone
@pytest.mark.parametrize("method", METHODS)
def test_half_the_cpu_is_half_the_speed(method: str) -> None:
    """Turns of 0.3 s, free and limited by turns in one run; the most work of a CPU second, and its median share.

    Whoever shares the core with this machine makes single turns up to twice as slow as the one before, for less than a
    second, and medians of neighbouring turns were off by three quarters; the quickest of many turns are undisturbed.
    The speed is the work of a CPU second times the CPU seconds a second; the free process has one of these a second on
    an idle machine, and less beside others. They may take time from the limited one, too, so then half is still the
    most that it gets, but the least is not known.
    """
    with (
        limited(ProcessLimits(cores=1), "watched") as (free, _),
        limited(ProcessLimits(cores=1, cpu_share=0.5), method) as (slow, held),
    ):
        both = []
        for _ in range(30):
            turn = free.call(Worker.work, MOST_S, 0.3)
            # A process that was idle begins with a whole quota; one that worked for a period has used up its share.
            slow.call(Worker.work, MOST_S, 0.1)
            both.append((turn, slow.call(Worker.work, MOST_S, 0.3)))
    quickest, limited_quickest = (max(turns / cpu for turns, cpu, _ in some) for some in zip(*both, strict=True))
    as_quick = limited_quickest / quickest
    granted = median(cpu / wall for (_, cpu, wall), _ in both)
    share = median(cpu / wall for _, (_, cpu, wall) in both)
    print(f"{held.cpu_method}: {share:.3f} of a core, {granted:.3f} without a limit, and {as_quick:.3f} as quick there")
    assert as_quick == pytest.approx(1, abs=0.15)
    assert as_quick * share <= 0.5 * 1.15
    if granted > 0.9:
        assert as_quick * share >= 0.5 * 0.85
    expected = "SIGSTOP and SIGCONT by turns" if method == "watched" else "the quota of a control group"
    assert expected in held.cpu_method


def test_cores_are_those_that_are_granted() -> None:
    with limited(ProcessLimits(cores=1), "watched") as (child, _):
        assert len(child.call(Worker.cores, MOST_S)) == 1
    assert ProcessLimits(cores=200).usable_cores == available_cores()


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
CUT = """
import os
from exporter.child import network
from tests.unit.test_confinement import Worker
print(Worker().reach({port}))
if {user} is not None:
    os.setuid({user})
print(network.{method}())
print(Worker().reach({port}))
"""


@pytest.mark.parametrize("user", [None, OTHERS["unprivileged"]])
@pytest.mark.parametrize(("method", "says"), [("_leave", "unreachable"), ("_refuse_sockets", "not permitted")])
def test_either_method_cuts_the_network(method: str, says: str, user: int | None) -> None:
    if user is not None and os.geteuid():
        pytest.skip("only root can become another user")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CUT.format(user=user, method=method, port=server.getsockname()[1])
        made = subprocess.run(
            [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
    before, cut, after = made.stdout.splitlines()
    assert before == "connected"
    if cut == "False":
        pytest.skip(f"{method} is not to be had here")
    assert says in after


def test_a_socket_call_inside_fails() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, limited(ProcessLimits(), "watched") as (child, _):
        assert child.run(cut_network, MOST_S) != []
        assert child.call(Worker.reach, MOST_S, server.getsockname()[1]) != "connected"


def test_without_a_method_the_network_is_not_said_to_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_leave", lambda: False)
    monkeypatch.setattr(network, "_refuse_sockets", lambda: False)
    monkeypatch.setattr(network, "reaches_network", lambda: False)
    cut = cut_network.__wrapped__
    assert cut() == []
    monkeypatch.setattr(network, "_leave", lambda: True)
    assert cut() == ["network namespace"]
    monkeypatch.setattr(network, "reaches_network", lambda: True)
    assert cut() == []
    monkeypatch.undo()
    monkeypatch.setattr(network, "ARCHITECTURES", {})
    assert not network._refuse_sockets()


def ours() -> list[Path]:
    found = [place.folder.glob(f"{PREFIX}-*") for place in places(*texts())]
    return [folder for one in found for folder in one]


def texts() -> tuple[str, str]:
    return Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()


PROGRAM = """
import os, signal, sys, time
from exporter.emulate.sandbox.cgroup import control_groups
from exporter.emulate.sandbox.confined import confined, controlled
from exporter.emulate.sandbox.limits import ProcessLimits
from exporter.child.process import Child
from tests.unit.test_confinement import Worker
if __name__ == "__main__":
    # What runs the tests in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    limits = ProcessLimits(memory_bytes=500_000_000, cpu_share=0.5)
    with control_groups(controlled(limits)) as groups, Child("worker", 1 << 40) as child:
        with confined(child.process_id, limits, {"memory": groups["memory"]} if groups else {}):
            child.make(Worker, 60)
            child.ready()
            print(child.process_id, flush=True)
            child.call(Worker.stand_still, 60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_exporter_ends_early(number: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, program], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        assert running.stdout is not None
        worker = psutil.Process(int(running.stdout.readline()))
        time.sleep(0.3)
        running.send_signal(number)
        running.wait(timeout=30)
    with pytest.raises(psutil.NoSuchProcess):
        worker.wait(timeout=10)
        worker.status()
    if number == signal.SIGKILL:
        # What it could not delete itself, the next one does.
        with control_groups({"memory": 10 * MB}):
            pass
    assert ours() == []


def test_a_child_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    program = "from exporter.child.serve import serve; serve(0, 1, 1)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 1


V1 = """\
4:memory:/box/one
2:cpu,cpuacct:/
1:name=systemd:/init
0::/box
"""
MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 /box /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
"""


def test_places_of_both_versions() -> None:
    unified, root = Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")
    assert places(V1, MOUNTS) == [
        Place(unified / "box", 2, ("memory", "cpu")),
        Place(unified, 2, ("memory", "cpu")),
        Place(root / "memory/one", 1, ("memory",)),
        Place(root / "cpu,cpuacct", 1, ("cpu",)),
    ]
    assert places("0::/../elsewhere\n4:memory:/other\n", MOUNTS) == []
    assert places("0::/\n", MOUNTS) == [Place(unified, 2, ("memory", "cpu"))]
    assert places(V1, "") == []


@pytest.mark.parametrize(
    ("version", "controller", "most", "files"),
    [
        (2, "memory", 64 * MB, {"memory.max": "64000000", "memory.swap.max": "0"}),
        (2, "cpu", 1.5, {"cpu.max": "30000 20000"}),
        (1, "memory", 64 * MB, {"memory.limit_in_bytes": "64000000", "memory.memsw.limit_in_bytes": "64000000"}),
        (1, "cpu", 0.25, {"cpu.cfs_period_us": "20000", "cpu.cfs_quota_us": "5000"}),
        (2, "cpu", 0.01, {"cpu.max": "1000 100000"}),
    ],
)
def test_limits_as_the_kernel_reads_them(
    tmp_path: Path, version: int, controller: Controller, most: float, files: dict[str, str]
) -> None:
    group = ControlGroup(tmp_path, version)
    assert not group.limit(controller, most)
    for name in (*files, "cgroup.procs"):
        (tmp_path / name).touch()
    assert group.limit(controller, most)
    assert group.add(4711)
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert (tmp_path / "cgroup.procs").read_text() == "4711"


def test_what_groups_tell(tmp_path: Path) -> None:
    group = ControlGroup(tmp_path, 2)
    assert (group.killed, group.paged_bytes) == (False, 0)
    (tmp_path / "memory.events").write_text("max 12\noom 1\noom_kill 1\n")
    (tmp_path / "memory.failcnt").write_text("0\n")
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
    (tmp_path / "memory.stat").write_text("workingset_refault_anon 7\nworkingset_refault_file 3\n")
    assert (group.killed, group.paged_bytes) == (True, 3 * os.sysconf("SC_PAGESIZE"))
    first = ControlGroup(tmp_path, 1)
    assert (first.killed, first.paged_bytes) == (True, 0)
    (tmp_path / "memory.failcnt").write_text("18\n")
    assert first.paged_bytes == group.paged_bytes


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"memory_bytes": 0}, "the memory limit is impossible; got 0, expected 1,048,576 to .* bytes"),
        ({"cores": 0}, "the number of cores is impossible; got 0, expected 1 to 256 cores"),
        ({"cpu_share": 1.5}, "the share of the CPU is impossible; got 1.5, expected 0.01 to 1"),
        ({"cpu_share": float("nan")}, "the share of the CPU is impossible; got nan"),
        ({"timeout_s": 0}, "the timeout is impossible; got 0, expected 1 to 86,400 seconds"),
    ],
)
def test_impossible_limits_are_one_sentence(limits: dict[str, float], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        ProcessLimits(**limits)  # type: ignore[arg-type]


def test_what_hinders_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hindrance() is None

    def refused(_: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(confining.os, "pidfd_open", refused)
    assert "pidfd_open: Function not implemented" in (hindrance() or "")
    monkeypatch.setattr(confining.sys, "platform", "darwin")
    assert hindrance() == "only Linux is supported"
