"""Commands in a fresh home and on a recorded network, of which nothing may come."""

import os
from pathlib import Path

from tests.commands import ROOT
from tests.recorder import HEARD, recorded

SWITCHES = {"DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "ORT_DISABLE_TELEMETRY"}
# Some telemetry is off where one of these says that no user is there.
SWITCHES |= {"CI", "TF_BUILD", "JENKINS_URL"}


def quietly(folder: Path, *command: str) -> None:
    """Run a command in a folder, whose `cache` it uses; its user even asks for telemetry."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {"EDGE_EXPORTER_CACHE": str(folder / "cache"), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"ORT_DISABLE_TELEMETRY": "0"}
    done, reached = recorded(list(command), folder / "record.json", folder, environment)
    assert done.returncode == 0, done.stderr
    assert reached in (HEARD, None)
    assert left_in(home) == set()


def left_in(home: Path) -> set[str]:
    """Return the files in a home."""
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
