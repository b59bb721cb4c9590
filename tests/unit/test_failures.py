"""What ends a build early: the user, the disk, a bad model, a fault of ours. Nothing half-written stays."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from exporter import pipeline
from exporter.cli.main import main
from exporter.foundation.errors import ExporterError, RequestError
from exporter.planning.job import Job
from exporter.targets.artifact import Artifact
from exporter.targets.gguf.target import Gguf
from tests.models import tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(WORDS)
    return tmp_path


def job(folder: Path) -> Job:
    text = folder / "text.txt"
    return Job(
        str(folder / "model"), "raspberry-pi-5", "gguf", "Q4_0", output=folder / "bundle", calibration=text,
        evaluation=text, context=128,
    )  # fmt: skip


def command(*extra: str) -> list[str]:
    asked = ["build", "model", "-d", "raspberry-pi-5", "-t", "gguf", "--type", "Q4_0", "-o", "bundle"]
    texts = ["--calibration", "text.txt", "--evaluation", "text.txt", "--context", "128"]
    return [sys.executable, "-m", "exporter.cli.main", *asked, *texts, *extra]


def contents(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing_and_can_be_run_again(folder: Path, sent: signal.Signals) -> None:
    before = contents(folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command(), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as running:
        until = time.monotonic() + 60
        while not list(folder.glob(".bundle.partial-*")) and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(3):
            running.send_signal(sent)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 128 + sent
    assert "interrupted; nothing half-written was left" in said
    assert "Traceback" not in said
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir()} <= {"cache", "model", "text.txt"}
    done = subprocess.run(command(), cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("number", "sentence"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission to write")]
)
def test_a_disk_that_refuses_to_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def refuse(self: object, data: object) -> None:
        raise OSError(number, os.strerror(number))

    before = contents(folder)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", refuse)
    with pytest.raises(RequestError, match=sentence):
        pipeline.build(job(folder))
    assert contents(folder) == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("tensor", "check"),
    [("blk.1.ffn_up.weight", "lowering.weights"), ("output_norm.weight", "lowering")],
)
def test_an_artifact_that_is_not_the_planned_model_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, check: str
) -> None:
    write = Gguf.write

    def damaged(*arguments: Any) -> Artifact:
        artifact = write(*arguments)
        (found,) = (one for one in gguf.GGUFReader(artifact.weights[0], "r+").tensors if one.name == tensor)
        found.data[...] = -found.data
        return artifact

    monkeypatch.setattr(Gguf, "write", damaged)
    with pytest.raises(ExporterError, match=f"{check}: the artifact is not the model that was planned"):
        pipeline.build(job(folder))
    assert not (folder / "bundle").exists()
    assert not list(folder.glob(".*"))


def test_weights_that_are_no_numbers_name_the_tensor(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    done = run(folder)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"edge-exporter: {name}: the tensor holds NaN or infinity; got 1 of")
    assert not (folder / "bundle").exists()


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command(), cwd=folder, env=merged, capture_output=True, text=True, check=False)


def test_a_cache_that_cannot_be_made(folder: Path) -> None:
    (folder / "file").touch()
    done = run(folder, EDGE_EXPORTER_CACHE=str(folder / "file" / "cache"))
    assert done.returncode == 2
    assert "the cache folder cannot be made" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "code", "sentence"),
    [
        (ValueError("a slip"), 70, "this is a fault of edge-exporter"),
        (
            PermissionError(errno.EACCES, "Permission denied", "config.json"),
            2,
            "config.json: Permission denied",
        ),
    ],
)
def test_what_no_one_expected_still_ends_in_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception, code: int,
    sentence: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr(pipeline, "build", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["edge-exporter", *command()[3:]])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert sentence in capsys.readouterr().err.splitlines()[-1]
