"""Bundles to measure, a device over ssh and a phone over adb."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.connect.adb_server import AdbServer
from tests.connect.quiet import quietly
from tests.connect.sshd import INSTALL, Sshd, find_sshd
from tests.models import tiny_model

TYPES = {"gguf": "Q8_0", "onnx": "int8"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a million weights and a bundle of it for each target."""
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model", hidden=128, intermediate=1280)
    words = "the capital of France is Paris, numbers 12 345 and hello world. "
    (folder / "calibration.txt").write_text(words * 400)
    (folder / "evaluation.txt").write_text(words[::-1] * 400)
    for target, type in TYPES.items():
        quietly(
            folder, sys.executable, "-m", "exporter.cli.main",
            "build", "model", "--device", "raspberry-pi-5", "--target", target, "--type", type, "--method", "rtn",
            "--effort", "fast", "--context", "64", "--threads", "1", "-o", target,
            "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "--json",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def bundle(world: Path) -> Path:
    return world / "gguf"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    program = find_sshd()
    if program is None:
        pytest.skip(f"there is no sshd: {INSTALL}")
    with Sshd(tmp_path_factory.mktemp("sshd")).running(program) as running:
        yield running


@pytest.fixture
def sshd(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """A device over ssh that is well, and this user's home beside it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.restore()
    yield server
    assert server.left == []
    # ONNX Runtime leaves a device's id in the home where its telemetry is on.
    assert not list(server.far.rglob("Microsoft"))


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AdbServer]:
    """A phone behind an adb server."""
    with AdbServer(tmp_path / "phone") as server:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.port))
        yield server
    assert server.left == []
