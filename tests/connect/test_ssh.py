"""The whole measurement over a real ssh server, and all that can go wrong with it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.bench.bundle_under_test import subject_of
from exporter.bench.engine import Settings
from exporter.bench.measurement import Remote, measure_on, quantities
from exporter.bench.profile import write_profile
from exporter.device.connect.connection import DroppedError, address_of
from exporter.device.profile import load_device
from exporter.foundation.errors import InputError, MissingDependencyError, RequestError
from tests.commands import cli, started
from tests.connect.adb_server import free_port
from tests.connect.sshd import HOST, Sshd, key
from tests.connect.waiting import becomes, ended

QUICK = Settings(prompt=8, generate=4, depth=0, context=64, repeats=2, sustain_s=0, threads=1)
FLAGS = ("-p", "8", "-n", "4", "-r", "2", "--threads", "1", "--python", sys.executable)
# Keeps what it was started with, by which a process is known to be ours.
SLEEP = f'exec {sys.executable} -c "import time; time.sleep(60)" "$@"'
# A Python that does something else for one command of the measuring program.
PYTHON = '#!/bin/sh\ncase "$3" in {command}) {instead};; esac\nexec {python} {options} "$@"\n'
FEW = "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho /dev/sd 999 900 {kib} 99% /\n"


def measured(sshd: Sshd, bundle: Path, device: str | None = None, **options: object) -> dict[str, float]:
    remote = Remote(address_of(sshd.address), **{"python": sys.executable, **options})  # type: ignore[arg-type]
    outcome = measure_on(bundle, remote, QUICK, device, lambda *_: None)
    assert [check.status for check in outcome.checks if check.name != "device.instructions"] == ["passed", "passed"]
    return {name: quantity.value for name, quantity in quantities(outcome).items()}


def misbehaving(sshd: Sshd, command: str, instead: str, options: str = "") -> str:
    sshd.put("other-python", PYTHON.format(command=command, instead=instead, python=sys.executable, options=options))
    return "other-python"


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_the_whole_cycle(sshd: Sshd, world: Path, target: str) -> None:
    done = cli(world, "bench", target, "--on", sshd.address, *FLAGS, "--sustain", "0.05", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert {check["name"]: check["status"] for check in facts["checks"]} == {
        "bytes": "passed", "device.instructions": "not run", "selftest": "passed",
    }  # fmt: skip
    names = ("speed.prefill_tokens_per_s", "speed.decode_tokens_per_s", "speed.sustained_share", "memory.peak_bytes")
    assert all(facts[name]["value"] > 0 and facts[name]["basis"] == "measured" for name in names)
    assert [len(test["samples_ns"]) for test in facts["tests"]] == [2, 2]
    assert facts["sustained_ns"] and facts["where"] == sshd.address
    with subject_of(world / target) as subject:
        assert facts["transfer.sent_bytes"]["value"] > subject.artifact.file_bytes


def test_a_measured_profile(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    remote = Remote(address_of(sshd.address), python=sys.executable)
    outcome = measure_on(bundle, remote, QUICK, None, lambda *_: None)
    with pytest.raises(RequestError, match=r"no profile to start from; .*--device"):
        write_profile(outcome, None, tmp_path / "mine.toml")
    write_profile(outcome, "raspberry-pi-5", tmp_path / "mine.toml")
    run = load_device(str(tmp_path / "mine.toml")).measured[-1]
    assert (run.basis, run.backend, run.format) == ("measured", "cpu", "Q8_0")
    assert run.decode_tokens_per_s == outcome.measured.decode.tokens_per_s
    with pytest.raises(RequestError, match="already exists"):
        write_profile(outcome, "raspberry-pi-5", tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("name", "said"),
    [("kept.toml", "already exists"), ("mine.json", "ends with .toml"), ("none/mine.toml", "no such folder")],
)
def test_a_profile_that_cannot_be_written_is_refused_first(bundle: Path, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "kept.toml").touch()
    nowhere = ("--on", "ssh://nobody@127.0.0.1:1", "--profile", str(tmp_path / name))
    done = cli(bundle.parent, "bench", "gguf", *nowhere)
    assert (done.returncode, said in done.stderr) == (2, True)


def test_only_what_changed_is_sent(sshd: Sshd, bundle: Path) -> None:
    first = measured(sshd, bundle, keep=True)
    (kept,) = sshd.far.rglob("bench-*")
    (kept / "program/probe.py").write_text("changed")
    second = measured(sshd, bundle, keep=True)
    assert 0 < second["transfer.sent_bytes"] < 20_000 < first["transfer.sent_bytes"]
    assert not (kept / "pid").exists()
    assert measured(sshd, bundle)["transfer.sent_bytes"] == 0


def test_a_dropped_connection(sshd: Sshd, bundle: Path) -> None:
    sshd.drop_mid_push()
    with pytest.raises(DroppedError, match=r"the connection to the device was dropped.*run the command again\.$"):
        measured(sshd, bundle)
    sshd.restore()
    assert measured(sshd, bundle)["speed.decode_tokens_per_s"] > 0


def test_a_dropped_connection_to_a_device_that_is_gone(sshd: Sshd, bundle: Path) -> None:
    sshd.drop_mid_push()
    # The host key is not the known one any more, so no second connection comes about to clean up.
    sshd.put("mkdir", f'#!/bin/sh\necho > {sshd.home}/.ssh/known_hosts\nexec /bin/mkdir "$@"\n')
    with pytest.raises(DroppedError, match=r"its folder \S*/edge-exporter/bench-[0-9a-f]{16} goes when the device"):
        measured(sshd, bundle)
    assert becomes(lambda: sshd.left == [])


def test_interrupted_it_cleans_up(sshd: Sshd, bundle: Path) -> None:
    python = misbehaving(sshd, "selftest", SLEEP)
    running = started(bundle.parent, "bench", "gguf", "--on", sshd.address, *FLAGS[:-1], python)
    pid = wait_for(sshd.far, "bench-*/pid")
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert "interrupted" in (bundle.parent / "errors.txt").read_text()
    assert becomes(lambda: ended(pid))


def test_killed_it_is_cleaned_up_by_the_device(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    # What was started waits for what it starts.
    child = tmp_path / "child"
    python = misbehaving(sshd, "selftest", f"sleep 60 & echo $! > {child}; wait")
    running = started(bundle.parent, "bench", "gguf", "--on", sshd.address, *FLAGS[:-1], python)
    pid = wait_for(sshd.far, "bench-*/pid")
    assert becomes(child.exists)
    running.kill()
    running.wait()
    assert becomes(lambda: ended(pid) and ended(int(child.read_text())) and sshd.left == [])


def wait_for(folder: Path, pattern: str) -> int:
    for _ in range(600):
        for path in folder.rglob(pattern):
            if text := path.read_text():
                return int(text)
        time.sleep(0.1)
    raise AssertionError(f"no {pattern}")


def test_a_host_key_that_is_not_known(sshd: Sshd, bundle: Path) -> None:
    sshd.know_nothing()
    with pytest.raises(
        RequestError, match=rf"host key is not known; got ssh-ed25519 SHA256:.*ssh-keyscan -p \d+ {HOST}"
    ):
        measured(sshd, bundle)


def test_a_host_key_that_changed(sshd: Sshd, bundle: Path) -> None:
    sshd.know(sshd.identity)
    with pytest.raises(RequestError, match=r"not the one that is known; got ssh-ed25519.*ssh-keygen -R '\[127"):
        measured(sshd, bundle)


def test_a_host_key_of_another_kind_is_a_changed_one(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", tmp_path / "other"], check=True)
    sshd.know(tmp_path / "other")
    with pytest.raises(RequestError, match=r"not the one that is known"):
        measured(sshd, bundle)


def test_known_hosts_that_cannot_be_read(sshd: Sshd, bundle: Path) -> None:
    (sshd.home / ".ssh/known_hosts").write_text("@strange marker\n")
    with pytest.raises(InputError, match=r"the known host keys cannot be read"):
        measured(sshd, bundle)


def test_a_refused_key(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the device refused the key; give it yours with ssh-copy-id -p \d+ "):
        measured(sshd, bundle, identity=key(tmp_path / "stranger"))


def test_a_key_with_a_passphrase(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked"], check=True)
    with pytest.raises(RequestError, match=r"the key cannot be used.*ssh-add"):
        measured(sshd, bundle, identity=tmp_path / "locked")
    assert measured(sshd, bundle, identity=sshd.identity)


def test_nothing_answers(sshd: Sshd, bundle: Path) -> None:
    remote = Remote(address_of(f"ssh://{HOST}:{free_port()}"))
    with pytest.raises(RequestError, match=r"the device cannot be reached; got .*Connect call failed"):
        measure_on(bundle, remote, QUICK, None, lambda *_: None)


def test_no_room_is_seen_before_anything_is_sent(sshd: Sshd, bundle: Path) -> None:
    sshd.put("df", FEW.format(kib=1500))
    with pytest.raises(RequestError, match=r"no room for the bundle; got 1,536,000 bytes free, expected .* --folder"):
        measured(sshd, bundle)


def test_a_disk_that_fills_up(sshd: Sshd, bundle: Path) -> None:
    sshd.put("cat", '#!/bin/sh\n[ $# -gt 0 ] && exec /bin/cat "$@"\nexec /bin/cat > /dev/full\n')
    with pytest.raises(RequestError, match=r"the device ran out of room; got .*No space left on device'"):
        measured(sshd, bundle)


def test_a_limit_of_file_sizes(sshd: Sshd, bundle: Path) -> None:
    sshd.put("cat", '#!/bin/sh\n[ $# -gt 0 ] && exec /bin/cat "$@"\nulimit -f 100\nexec /bin/cat\n')
    with pytest.raises(RequestError, match=r"the device ran out of room"):
        measured(sshd, bundle)


def test_a_folder_that_cannot_be_made(sshd: Sshd, bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"no folder can be made on the device"):
        measured(sshd, bundle, folder="/proc/nowhere")


def test_a_file_that_cannot_be_written(sshd: Sshd, bundle: Path) -> None:
    sshd.put("cat", '#!/bin/sh\n[ $# -gt 0 ] && exec /bin/cat "$@"\necho "cat: Input/output error" >&2\nexit 1\n')
    with pytest.raises(RequestError, match=r"the device could not write the file; got 'cat: Input/output error'"):
        measured(sshd, bundle)


def test_bytes_that_arrive_changed(sshd: Sshd, bundle: Path) -> None:
    sshd.put("sha256sum", f'#!/bin/sh\necho "{"0" * 64}  -"\n')
    with pytest.raises(InputError, match=r"the file on the device is not the one that was sent; got 0000"):
        measured(sshd, bundle)


def test_a_bundle_that_was_changed_here(sshd: Sshd, bundle: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(bundle, tmp_path / "changed")
    data = bytearray((changed / "model/model.gguf").read_bytes())
    data[-1] ^= 1
    (changed / "model/model.gguf").write_bytes(data)
    with pytest.raises(InputError, match=r"the file is not the one that the manifest lists"):
        measured(sshd, changed)


def test_no_python(sshd: Sshd, bundle: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"there is no python4; .*apt-get install python3"):
        measured(sshd, bundle, python="python4")


def test_a_python_without_the_runtime(sshd: Sshd, bundle: Path) -> None:
    bare = misbehaving(sshd, "never", "true", options="-I -S")
    with pytest.raises(
        MissingDependencyError, match=r"lacks .* got numpy, llama-cpp-python; .*-m pip install numpy llama-"
    ):
        measured(sshd, bundle, python=bare)


def test_a_runtime_for_the_user_alone(sshd: Sshd, bundle: Path) -> None:
    bare = misbehaving(sshd, "never", "true", options="-S")
    site = sshd.far / f".local/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "llama_cpp").mkdir(parents=True)
    (site / "llama_cpp/__init__.py").touch()
    with pytest.raises(
        MissingDependencyError,
        match=rf"other-python finds the model's runtime only where isolated programs do not look; got "
        rf"llama-cpp-python in {site}, expected .*; make an environment there .*pip install numpy llama-cpp-python.*"
        r" --python",
    ):
        measured(sshd, bundle, python=bare)
    shutil.rmtree(sshd.far / ".local")


def test_a_python_in_the_home(sshd: Sshd, bundle: Path) -> None:
    (sshd.far / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (sshd.far / "python").chmod(0o700)
    assert measured(sshd, bundle, python="~/python")
    (sshd.far / "python").unlink()


@pytest.mark.parametrize(
    ("command", "instead", "error", "sentence"),
    [
        ("selftest", "kill -ILL $$", RequestError, "used an instruction that the device's processor lacks"),
        ("measure", "kill -KILL $$", RequestError, "the device ended the program; got signal SIGKILL"),
        ("measure", "echo 'no memory' >&2; exit 1", RequestError, "failed on the device; got 'no memory'"),
        ("measure", "echo '{\"runtime\": 1}'; exit", InputError, "not one of the measuring program's; got 'runtime'"),
        ("measure", "yes", RequestError, "the device printed more than an answer has"),
        ("selftest", "echo hello; exit", InputError, "not one of the measuring program's; got 'the text'"),
    ],
)
def test_a_device_that_fails(
    sshd: Sshd, bundle: Path, command: str, instead: str, error: type[Exception], sentence: str
) -> None:
    python = misbehaving(sshd, command, instead)
    with pytest.raises(error, match=sentence):
        measured(sshd, bundle, python=python)


def test_a_model_that_answers_otherwise(sshd: Sshd, bundle: Path) -> None:
    python = misbehaving(sshd, "selftest", """echo '{"tokens": [1, 2], "logits": [0.5, 0.5]}'; exit""")
    done = cli(bundle.parent, "bench", "gguf", "--on", sshd.address, *FLAGS[:-1], python)
    assert done.returncode == 1
    assert "1 of 3 checks failed: selftest" in done.stderr


def test_a_device_that_is_said_to_be_another(sshd: Sshd, bundle: Path) -> None:
    with pytest.raises(RequestError, match=r"lacks instructions of the profile raspberry-pi-5; .*--device"):
        measured(sshd, bundle, device="raspberry-pi-5")
    assert sshd.left == []


def test_a_device_without_posix(sshd: Sshd, bundle: Path) -> None:
    sshd.put("uname", "#!/bin/sh\nexit 1\n")
    sshd.put("cat", "#!/bin/sh\nexit 1\n")
    sshd.put("getprop", "#!/bin/sh\nexit 0\n")
    with pytest.raises(RequestError, match=r"the device does not say what it is"):
        measured(sshd, bundle)
