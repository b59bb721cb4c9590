"""The command line in a process of its own, with a cache of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, whose `cache` it uses."""
    return subprocess.run(
        _command(arguments), cwd=folder, env=_environment(folder), capture_output=True, text=True, check=False
    )


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a folder, whose `cache` it uses; what it prints goes to `printed.txt` and `errors.txt`."""
    with (folder / "printed.txt").open("w") as printed, (folder / "errors.txt").open("w") as errors:
        return subprocess.Popen(
            _command(arguments), cwd=folder, env=_environment(folder), stdout=printed, stderr=errors, text=True
        )


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "exporter.cli.main", *arguments]


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"EDGE_EXPORTER_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}


def printed(folder: Path, *arguments: str) -> str:
    """Run a command that must succeed and return what it printed."""
    done = cli(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
