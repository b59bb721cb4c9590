"""Builds in processes of their own: killed at any moment, or side by side."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tests.damage import left_over
from tests.models import tiny_model

ROOT = Path(__file__).parents[1]
ALONE = "alone"
WORDS = "the capital of France is Paris, numbers 12 345 and hello world. " * 400


def source(folder: Path) -> Path:
    """Write a tiny model and a text into a folder."""
    tiny_model(folder / "model", layers=3)
    (folder / "text.txt").write_text(WORDS)
    return folder


def started(folder: Path, output: str) -> subprocess.Popen[str]:
    """Start a build with the cache `cache`, which samples its calibration text; temporary files go to `temporary`."""
    (folder / "temporary").mkdir(exist_ok=True)
    asked = ["build", "model", "-d", "raspberry-pi-5", "-t", "gguf", "--type", "Q4_0", "--effort", "fast"]
    options = ["--evaluation", "text.txt", "--context", "128", "--threads", "1", "-o", output]
    own = {"EDGE_EXPORTER_CACHE": str(folder / "cache"), "TMPDIR": str(folder / "temporary"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "exporter.cli.main", *asked, *options], cwd=folder, env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(folder: Path, running: Mapping[str, subprocess.Popen[str]]) -> None:
    """Wait until builds end, which must give the bundle of `alone` and leave nothing but it."""
    for name, process in running.items():
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert "Traceback" not in said
        assert digest(folder / name) == digest(folder / ALONE)
        shutil.rmtree(folder / name)
    assert left_over(folder) == []
    assert list((folder / "temporary").iterdir()) == []
    assert {path.name for path in folder.iterdir()} <= {"cache", ALONE, "model", "text.txt", "temporary"}
    shutil.rmtree(folder / "cache")


def digest(bundle: Path) -> str:
    """Return the content digest of a bundle."""
    found: str = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["content_digest"]
    return found


def alone(folder: Path) -> float:
    """Make the bundle that all others must equal, and return the seconds that it takes."""
    began = time.monotonic()
    running = started(folder, "made")
    _, said = running.communicate()
    assert running.returncode == 0, said
    (folder / "made").rename(folder / ALONE)
    shutil.rmtree(folder / "cache")
    return time.monotonic() - began


def side_by_side(folder: Path, at_once: int = 2) -> None:
    """Make bundles at once."""
    finished(folder, {name: started(folder, name) for name in map(str, range(at_once))})


def killed(folder: Path, after_s: float) -> bool:
    """Kill a build some time after it first touched the cache; return whether it was still running."""
    touched = folder / "cache" / "held"
    before = _changed(touched)
    process = started(folder, "bundle")
    while _changed(touched) == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(after_s)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    shutil.rmtree(folder / "bundle", ignore_errors=True)
    return alive


def _changed(folder: Path) -> int:
    return folder.stat().st_mtime_ns if folder.is_dir() else 0


def kills(folder: Path, takes_s: float, count: int, seed: int, in_a_row: int, at_once: int = 1) -> int:
    """Kill builds at random moments, let others end after every few, and return how many builds were begun.

    Args:
        folder: Where `alone` made its bundle.
        takes_s: Seconds of a build.
        count: How many are killed.
        seed: Of the moments.
        in_a_row: After so many, the next goes on from what they left until its end.
        at_once: How many do so, side by side.
    """
    chance, met, begun = random.Random(seed), 0, 0
    while met < count:
        begun += 1
        if not killed(folder, chance.uniform(0, takes_s)):
            # It had ended. The machine may be quicker than it was, so the next moments come sooner.
            takes_s *= 0.7
            shutil.rmtree(folder / "cache")
            continue
        met += 1
        if met % in_a_row == 0:
            side_by_side(folder, at_once)
    return begun
