"""Commands for bundles and predictions need nothing that macOS or Windows lacks."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

BUNDLES = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
# Modules that Windows lacks, and what Linux alone has, hidden from this package in every process.
SITE = """
import builtins, importlib, os, sys

LACKING = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix", "readline", "crypt", "nis"}
found = builtins.__import__
by_name = importlib.import_module


def hidden(name, globals=None, *more, **named):
    if name.partition(".")[0] in LACKING and str((globals or {}).get("__name__")).startswith("exporter"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return found(name, globals, *more, **named)


def hidden_by_name(name, package=None):
    if name in LACKING:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return by_name(name, package)


builtins.__import__ = hidden
importlib.import_module = hidden_by_name
# As on Windows. A child of this package leaves the network on Linux alone, where it asks for its user.
del os.O_NOFOLLOW, os.O_NONBLOCK, os.O_CLOEXEC
if "-c" not in sys.orig_argv:
    del os.geteuid
"""
# Importing the modules of the commands must not read /proc, either.
IMPORTS = """
import sys

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")):
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.startswith("exporter"):
                raise RuntimeError(f"{name} opens {arguments[0]} as it is imported")
            frame = frame.f_back if name.startswith(("pathlib", "io", "os", "codecs")) else None

sys.addaudithook(refuse)
import exporter.bundle.installed, exporter.bundle.transport, exporter.bundle.verify
import exporter.cli.main, exporter.cli.show, exporter.predict.prediction, exporter.device.profile
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with bundles, and with a module that hides what other systems lack."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    for target in ("gguf", "onnx"):
        with tarfile.open(BUNDLES / f"{target}.tar.xz") as packed:
            packed.extractall(folder / target, filter="data")
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(folder / "site"), "EDGE_EXPORTER_CACHE": str(folder / "cache"), "COLUMNS": "200",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=folder, env=environment,
        timeout=240,
    )  # fmt: skip


def test_what_is_hidden_is_hidden(elsewhere: Path) -> None:
    code = "exec(compile('import fcntl', 'x', 'exec'), {'__name__': 'exporter.x'})"
    assert "No module named 'fcntl'" in python(elsewhere, "-c", code).stderr
    assert python(elsewhere, "-c", "import fcntl").returncode == 0


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "gguf"),
        ("verify", "onnx"),
        ("inspect", "gguf"),
        ("inspect", "gguf/model/model.gguf"),
        ("compare", "gguf", "onnx"),
        ("predict", "-d", "raspberry-pi-5", "--file-bytes", "1e8", "--params", "135e6", "--format", "Q4_K_M"),
        ("devices", "list"),
        ("devices", "show", "pixel-9"),
        ("run", "gguf", "-p", "the capital", "-n", "2"),
        ("run", "onnx", "-p", "the capital", "-n", "2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_runs_without_what_other_systems_lack(elsewhere: Path, command: tuple[str, ...]) -> None:
    found = python(elsewhere, "-m", "exporter.cli.main", *command)
    assert found.returncode == 0, found.stderr
    assert "No module named" not in found.stderr


def test_importing_them_reads_nothing_that_linux_alone_has(elsewhere: Path) -> None:
    found = python(elsewhere, "-c", IMPORTS)
    assert found.returncode == 0, found.stderr
