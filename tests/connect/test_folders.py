"""Folders on a device: each belongs to one process, goes with it, and what a dead one left goes next time."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from exporter.device.connect.local import Local
from exporter.device.connect.remote_folder import remote_folder
from exporter.device.connect.shell import line
from exporter.foundation.errors import RequestError
from tests.commands import ROOT
from tests.connect.waiting import becomes, ended

# Takes a folder, starts a program there that does not end, says so, and sleeps.
HOLDER = """
import sys, threading, time
from exporter.device.connect.local import Local
from exporter.device.connect.shell import line
from exporter.device.connect.remote_folder import remote_folder
with remote_folder(Local, sys.argv[1], None, keep=sys.argv[2] == "keep") as place:
    program = line("%s -c %s %s", sys.executable, "import time; time.sleep(60)", place.path)
    threading.Thread(target=place.work, args=(program, 60), daemon=True).start()
    while not (place.run(line("cat pid"))).output:
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's folders are made."""
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path))
    return tmp_path / "bench/edge-exporter"


class Measurement:
    """A process that measures."""

    def __init__(self, folder: Path, name: str, keep: str = "") -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", HOLDER, name, keep]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        (mark,) = folder.glob(f"{name}.*")
        self.folder, self.holder = folder / name, int(mark.suffix.removeprefix("."))
        self.program = int((self.folder / "pid").read_text())

    def kill(self, *, power: bool = False) -> None:
        """Kill it; where the power fails, the shell on the device that looks after its folder too."""
        if power:
            os.kill(self.holder, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def measure(name: str, keep: bool = False) -> None:
    """Take a folder and leave it."""
    with remote_folder(Local, name, None, keep):
        pass


def test_a_folder_goes_with_its_end(folder: Path) -> None:
    with remote_folder(Local, "bench-1", None, keep=False) as place:
        assert place.path == str(folder / "bench-1")
        assert place.write("file", b"text") == str(folder / "bench-1/file")
        assert (place.run(line("cat -- %s", "file"))).output == "text"
    assert not folder.exists()


def test_a_killed_measurement_leaves_nothing(folder: Path) -> None:
    killed = Measurement(folder, "bench-1")
    killed.kill()
    assert becomes(lambda: ended(killed.program) and not folder.exists())


def test_what_is_to_be_kept_stays(folder: Path) -> None:
    killed = Measurement(folder, "bench-1", "keep")
    (killed.folder / "file").touch()
    killed.kill()
    assert becomes(lambda: ended(killed.program) and names(folder) == ["bench-1"])
    measure("bench-2")
    assert names(killed.folder) == ["file", "kept"]
    measure("bench-1")
    assert not folder.exists()


def test_what_a_lost_device_left_goes_next_time(folder: Path) -> None:
    killed = Measurement(folder, "bench-1")
    killed.kill(power=True)
    # Nothing looks after it: this is what a sweep is for.
    assert not ended(killed.program) and len(names(folder)) == 2
    living = Measurement(folder, "bench-3")
    assert becomes(lambda: ended(killed.program))
    assert len(names(folder)) == 2 and killed.folder not in folder.iterdir()
    # Of one that is alive nothing goes, whoever begins and ends beside it.
    measure("bench-1")
    assert living.folder.is_dir() and not ended(living.program)
    living.kill()
    assert becomes(lambda: not folder.exists())


def test_a_number_that_came_again_is_not_killed(folder: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stranger:
        left = folder / "bench-1"
        left.mkdir(parents=True, mode=0o700)
        folder.chmod(0o700)
        (left / "pid").write_text(f"{stranger.pid}\n")
        (folder / f"bench-1.{os.uname().nodename}.{stranger.pid}").touch()
        measure("bench-2")
        assert stranger.poll() is None and not folder.exists()
        stranger.kill()


def test_marks_of_other_machines_on_a_shared_disk_count(folder: Path) -> None:
    (folder / "bench-1").mkdir(parents=True)
    mark = folder / "bench-1.another.machine.1"
    mark.touch()
    measure("bench-2")
    assert names(folder) == ["bench-1", mark.name]


def test_measurements_of_one_bundle_at_once_have_folders_of_their_own(folder: Path) -> None:
    with ExitStack() as stack:
        places = [stack.enter_context(remote_folder(Local, "bench-1", None, keep=False)) for _ in range(4)]
        assert [Path(place.path).name for place in places] == ["bench-1", "bench-1-2", "bench-1-3", "bench-1-4"]
        with pytest.raises(RequestError, match=r"no folder can be made .* got 'others measure this bundle there'"):
            measure("bench-1")
        assert len(names(folder)) == 8
    assert not folder.exists()


def test_many_begin_and_end_at_once(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from exporter.device.connect.local import Local;"
        "from exporter.device.connect.remote_folder import remote_folder\n"
        "for i in range(12):\n"
        "    with remote_folder(Local, f'bench-{i % 3}', None, keep=False) as place:\n"
        "        Path(place.path, 'mine').touch(exist_ok=False)\n"
        "        place.write('file', b'text')\n"
        "        assert sorted(one.name for one in Path(place.path).iterdir()) == ['file', 'mine']\n"
    )
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [one.communicate()[1] for one in running] == ["", "", ""]
    assert not folder.exists()
