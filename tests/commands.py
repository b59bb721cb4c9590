"""The command line in a process of its own, with a cache of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, whose `cache` it uses."""
    environment = os.environ | {"EDGE_EXPORTER_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "exporter.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def printed(folder: Path, *arguments: str) -> str:
    """Run a command that must succeed and return what it printed."""
    done = cli(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
