"""Artifacts under limits, in their own runtimes: what does not fit fails, what fits passes, and it is said how."""

import io
import json
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from exporter.bundle.verify import verify_bundle
from exporter.cli.main import app
from exporter.compress.compression import Compression
from exporter.device.profile import load_device
from exporter.emulate.sandbox.limits import ProcessLimits
from exporter.foundation.errors import CheckError, ExporterError, RuntimeCrashError
from exporter.foundation.quantities import Check
from exporter.model.sources import open_model
from exporter.prove import emulation
from exporter.prove.emulation import Emulation, EmulationRun, emulate, run_within
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from tests.commands import started
from tests.models import tiny_model

MB = 1_000_000
CONTEXT = 64
TOKENS = np.random.default_rng(0).integers(100, 300, (1, CONTEXT))
WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, int]:
    """An artifact of about 100 MB, and what the target predicts that its runtime holds at the most, in bytes."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "artifact").mkdir()
    target = load_target(request.param)
    with open_model(str(tiny_model(folder / "model", hidden=1024, intermediate=2880))) as model:
        decisions = target.decide(model, "F32", "rtn")
        artifact = lower(target, Compression(model, decisions), "F32", folder / "artifact").artifact
        return artifact, target.estimated_peak(model, decisions, CONTEXT).bytes


def named(found: Emulation) -> dict[str, Check]:
    return {check.name.removeprefix("emulation."): check for check in found.checks}


def test_100_mb_fail_under_64_mb_and_pass_a_tenth_above_their_predicted_peak(large: tuple[Artifact, int]) -> None:
    artifact, predicted = large
    assert 90 * MB < artifact.file_bytes < 110 * MB
    little = named(run_within(artifact, ProcessLimits(64 * MB, cores=1), TOKENS, CONTEXT))
    assert little["memory"].status == little["run"].status == "failed"
    assert "more than the 64.0 MB that one app may hold; ended by" in little["memory"].detail
    assert little["run"].detail == "it was ended for want of memory"
    assert little["cpu"].status == little["network"].status == "not run"
    enough = run_within(artifact, ProcessLimits(int(1.1 * predicted), cores=1), TOKENS, CONTEXT)
    assert {check.status for check in enough.checks} == {"passed"}, enough.checks
    peak = enough.quantities["peak_bytes"]
    print(f"{artifact.target}: predicted peak {predicted / MB:.1f} MB, emulated {peak.value / MB:.1f} MB")
    assert artifact.file_bytes < peak.value <= 1.1 * predicted
    assert named(enough)["memory"].limit == int(1.1 * predicted)
    assert "a watcher of the proportional set every 20 ms" in named(enough)["memory"].detail
    assert {quantity.basis for quantity in enough.quantities.values()} == {"emulated"}


def command(*arguments: str) -> str:
    """Run a command in this process, and return what it printed."""
    with redirect_stdout(io.StringIO()) as printed:
        app(list(arguments), standalone_mode=False)
    return printed.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a bundle of it that was run under the device's limits when it was built."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model")
    text = folder / "text.txt"
    text.write_text(WORDS)
    said = command(
        "build", str(folder / "model"), "--device", "raspberry-pi-5", "--target", "gguf", "--type", "Q8_0",
        "--method", "rtn", "--effort", "fast", "--context", "64", "--threads", "1", "--calibration", str(text),
        "--evaluation", str(text), "--emulate", "-o", str(folder / "bundle"),
    )  # fmt: skip
    assert "peak memory, under the device's limits" in said
    return folder


def test_build_reports_what_was_emulated(world: Path) -> None:
    facts = json.loads(command("inspect", str(world / "bundle"), "--json"))
    limit = load_device("raspberry-pi-5").app_memory_limit_bytes.value
    checks = {check["name"]: check for check in facts["checks"]}
    assert {name: checks[name]["status"] for name in emulation.NAMES} == dict.fromkeys(emulation.NAMES, "passed")
    assert checks["emulation.memory"]["limit"] == limit
    assert facts["emulation"]["peak_bytes"]["basis"] == "emulated"
    assert 0 < facts["emulation"]["peak_bytes"]["value"] <= limit
    # Speed under limits is this machine's and is called so.
    assert all(name.startswith(("host_", "peak_")) for name in facts["emulation"])
    assert "emulation.memory" in (world / "bundle/report.html").read_text(encoding="utf-8")
    assert {check.status for check in verify_bundle(world / "bundle")} == {"passed"}


def test_a_bundle_under_limits_of_ones_own(world: Path) -> None:
    limited = ("emulate", "run", str(world / "bundle"), "--device", "raspberry-pi-5", "--context", "64", "--cores", "1")
    facts = json.loads(command(*limited, "--cpu-share", "0.5", "--json"))
    assert {check["status"] for check in facts["checks"]} == {"passed"}
    assert facts["emulation"]["host_cpu_s"]["value"] <= 0.6 * facts["emulation"]["host_wall_s"]["value"] + 0.1
    with pytest.raises(CheckError, match=r"2 of 4 checks failed: emulation.run, emulation.memory"):
        command(*limited, "--memory-bytes", "8000000")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("bundle", "-d", "raspberry-pi-6"), 2, "did you mean 'raspberry-pi-5'"),
        (("model", "-d", "raspberry-pi-5"), 3, "check that the path is a complete bundle"),
        (("bundle", "-d", "raspberry-pi-5", "--memory-bytes", "0"), 2, "the memory limit is impossible; got 0"),
        (("bundle", "-d", "raspberry-pi-5", "--cpu-share", "50"), 2, "the share of the CPU is impossible; got 50"),
        (("bundle", "-d", "raspberry-pi-5", "--cores", "-1"), 2, "the number of cores is impossible; got -1"),
        (("bundle", "-d", "raspberry-pi-5", "--timeout", "nan"), 2, "the timeout is impossible; got nan"),
    ],
)
def test_wrong_requests_are_one_sentence(
    world: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    monkeypatch.chdir(world)
    with pytest.raises(ExporterError, match=sentence) as caught:
        command("emulate", "run", *arguments)
    assert caught.value.exit_code == code


def test_ctrl_c_leaves_no_process(world: Path) -> None:
    running = started(world, "emulate", "run", "bundle", "-d", "raspberry-pi-5", "--cpu-share", "0.01")
    until = time.monotonic() + 120
    children: list[psutil.Process] = []
    while not children and time.monotonic() < until:
        time.sleep(0.1)
        children = [one for one in psutil.Process(running.pid).children() if "child.serve" in " ".join(one.cmdline())]
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert "interrupted" in (world / "errors.txt").read_text()
    assert children
    assert not any(child.is_running() for child in children)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[emulation.Confinement, EmulationRun]]:
    """A confinement of this very process, and a run that is made up."""
    with emulation.confined_child("nothing", 100 * MB, ProcessLimits(100 * MB, cores=1, cpu_share=0.5)) as (
        _,
        confinement,
    ):
        yield (
            confinement,
            EmulationRun(emulation.Timing(1, 1, 1, 1, 1, 1), wall_s=2, cpu_s=1, network_methods=("seccomp",)),
        )


def test_what_was_not_limited_is_not_a_pass(held: tuple[emulation.Confinement, EmulationRun]) -> None:
    confinement, run = held
    confinement.watch.peak_bytes = 50 * MB
    assert emulation._check_cpu(run, confinement).status == "passed"
    late = emulation._check_cpu(replace(run, cpu_s=1.5), confinement)
    assert (late.status, "the limit was not kept: 0.75 CPU seconds" in late.detail) == ("not run", True)
    assert emulation._check_network(run).status == "passed"
    assert emulation._check_network(replace(run, network_methods=())).status == "not run"
    assert emulation._check_memory(run, confinement, 0, MB).status == "passed"
    assert emulation._check_memory(run, confinement, 2 * MB, MB).status == "failed"
    assert emulation._check_memory(None, confinement, 0, MB).status == "not run"
    confinement.watch.peak_bytes = 0
    assert "be read" in emulation._check_memory(run, confinement, 0, MB).detail
    unlimited = replace(confinement, limits=ProcessLimits())
    assert emulation._check_memory(run, unlimited, 0, MB).status == "not run"


def test_how_a_run_failed(held: tuple[emulation.Confinement, EmulationRun]) -> None:
    confinement, _ = held
    error = RuntimeCrashError("llama.cpp died")
    assert emulation._failure(confinement, error) == "llama.cpp died"
    confinement.watch.ended = "time"
    assert emulation._failure(confinement, error) == "it had not ended after 300 s and was stopped"


def test_where_nothing_can_be_limited_nothing_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "hindrance", lambda: "only Linux is supported")
    artifact = Artifact("gguf", Path("nowhere"), ())
    found = emulate(artifact, load_device("raspberry-pi-5"), TOKENS, CONTEXT)
    assert {(check.status, check.detail) for check in found.checks} == {("not run", "only Linux is supported")}
    assert found.quantities == {}
