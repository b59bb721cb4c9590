"""The whole measurement of a phone behind an adb server, and all that can go wrong with it."""

import json
import sys
from pathlib import Path

import pytest

from exporter.bench.engine import Settings
from exporter.bench.measurement import BenchOutcome, Remote, measure_on, quantities
from exporter.device.connect.adb import Adb
from exporter.device.connect.connection import DroppedError, address_of
from exporter.device.connect.shell import Line
from exporter.foundation.errors import InputError, MissingDependencyError, RequestError
from tests.commands import cli, started
from tests.connect.adb_server import SERIAL, AdbServer, free_port, llama_bench
from tests.connect.waiting import becomes, ended

QUICK = Settings(prompt=8, generate=4, depth=0, context=64, repeats=3, sustain_s=1, threads=4)


def measured(bundle: Path, binary: Path | None, serial: str = SERIAL, settings: Settings = QUICK) -> BenchOutcome:
    return measure_on(bundle, Remote(address_of(f"adb://{serial}"), binary=binary), settings, None, lambda *_: None)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    return llama_bench(tmp_path / "llama-bench")


def test_the_whole_cycle(phone: AdbServer, bundle: Path, binary: Path) -> None:
    done = cli(bundle.parent, "bench", "gguf", "--on", f"adb://{SERIAL}", "--binary", str(binary), "-r", "3", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["machine"]["cpu"] == "SM-S928B"
    assert facts["runtime"] == "llama.cpp abc1234 (6500)"
    assert facts["speed.prefill_tokens_per_s"]["value"] == pytest.approx(250, rel=0.01)
    assert facts["speed.decode_tokens_per_s"]["value"] == pytest.approx(25, rel=0.01)
    assert {check["name"]: check["status"] for check in facts["checks"]}["selftest"] == "not run"
    assert "memory.peak_bytes" not in facts


def test_a_sustained_run_and_how_warm_it_gets(phone: AdbServer, bundle: Path, binary: Path) -> None:
    outcome = measured(bundle, binary)
    assert len(outcome.measured.sustained_ns) == 7
    values = quantities(outcome)
    assert 0.9 < values["speed.sustained_share"].value < 1
    if not any(Path("/sys/class/thermal").glob("thermal_zone*")):
        assert values["temperature.after_celsius"].value == 41.5


def test_a_binary_that_the_phone_has(phone: AdbServer, bundle: Path) -> None:
    llama_bench(phone.files / "llama-bench")
    assert measured(bundle, None).measured.runtime == "llama.cpp abc1234 (6500)"


def test_no_binary(phone: AdbServer, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MissingDependencyError, match=r"the device has no llama-bench; name a static build .* --binary FILE"
    ):
        measured(bundle, None)
    with pytest.raises(RequestError, match=r"there is no such file; name a build of llama-bench"):
        measured(bundle, tmp_path / "none")


def test_what_llama_bench_cannot_run(phone: AdbServer, world: Path, binary: Path) -> None:
    with pytest.raises(RequestError, match=r"llama-bench cannot run the bundle; got target onnx"):
        measured(world / "onnx", binary)


@pytest.mark.parametrize(
    ("state", "step"),
    [("unauthorized", "accept this machine's key"), ("offline", "adb reconnect"), ("asleep", "see what adb devices")],
)
def test_a_phone_that_does_not_answer(phone: AdbServer, bundle: Path, binary: Path, state: str, step: str) -> None:
    phone.state = state
    with pytest.raises(RequestError, match=f"the phone cannot be reached; got 'device {state}'; .*{step}"):
        measured(bundle, binary)


def test_another_serial(phone: AdbServer, bundle: Path, binary: Path) -> None:
    with pytest.raises(RequestError, match=r"not found.*take a serial from the list"):
        measured(bundle, binary, serial="ABC")


def test_an_old_phone(phone: AdbServer, bundle: Path, binary: Path) -> None:
    phone.features = "cmd"
    with pytest.raises(RequestError, match=r"the phone's adb is too old; expected Android 7 or newer"):
        measured(bundle, binary)


@pytest.mark.parametrize("port", ["", "many"])
def test_no_adb_server(bundle: Path, binary: Path, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port or str(free_port()))
    with pytest.raises(RequestError, match=r"no adb server answers; got .*; start it with adb start-server"):
        measured(bundle, binary)


def test_a_full_phone(phone: AdbServer, bundle: Path, binary: Path) -> None:
    phone.room = 500_000
    with pytest.raises(RequestError, match=r"the device ran out of room; got .*No space left on device.* --folder"):
        measured(bundle, binary)


def test_a_phone_that_cannot_write(phone: AdbServer, bundle: Path, binary: Path) -> None:
    phone.room, phone.trouble = 500_000, b"I/O error"
    with pytest.raises(RequestError, match=r"the device could not write the file; got .*I/O error"):
        measured(bundle, binary)


def test_a_cable_that_is_pulled(phone: AdbServer, bundle: Path, binary: Path) -> None:
    phone.cut = 300_000
    with pytest.raises(DroppedError, match=r"the connection to the device was dropped"):
        measured(bundle, binary)


def test_killed_it_is_cleaned_up_by_the_phone(phone: AdbServer, bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "slow"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import time; time.sleep(60)" "$@"\n')
    running = started(bundle.parent, "bench", "gguf", "--on", f"adb://{SERIAL}", "--binary", str(script))
    assert becomes(lambda: any(phone.files.rglob("pid")))
    pid = int(next(phone.files.rglob("pid")).read_text())
    running.kill()
    running.wait()
    assert becomes(lambda: ended(pid) and phone.left == [])


def test_an_answer_that_trickles_in(phone: AdbServer) -> None:
    device = Adb(address_of(f"adb://{SERIAL}"))
    phone.trickle_s = 0.1
    with pytest.raises(RequestError, match=r"the device did not finish; expected an answer within 1 s"):
        device.run(Line("echo a long answer"), timeout_s=1)


def test_a_program_without_an_end(phone: AdbServer, bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "endless"
    script.write_text("#!/bin/sh\nhead -c 5000000 /dev/zero\n")
    with pytest.raises(RequestError, match=r"the device printed more than an answer has"):
        measured(bundle, script)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [("[]", "llama-bench measured something else"), ("[{}]", "the device's answer is not one of"), ("hi", "the text")],
)
def test_a_program_that_answers_otherwise(
    phone: AdbServer, bundle: Path, tmp_path: Path, rows: str, sentence: str
) -> None:
    script = tmp_path / "other"
    script.write_text(f"#!/bin/sh\necho '{rows}'\n")
    with pytest.raises(InputError, match=sentence):
        measured(bundle, script)


def test_a_program_that_the_processor_cannot_run(phone: AdbServer, bundle: Path, tmp_path: Path) -> None:
    script = tmp_path / "other"
    script.write_text("#!/bin/sh\nkill -ILL $$\n")
    with pytest.raises(RequestError, match=r"used an instruction that the device's processor lacks"):
        measured(bundle, script)
    assert not any(phone.files.iterdir())
