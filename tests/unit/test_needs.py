"""What is said of memory and disk before a build, and that freed memory goes back."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.layer_stream import silent
from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.effort import effort
from exporter.model.sources import open_model
from exporter.planning.build_footprint import build_peak_bytes, cache_bytes
from exporter.planning.job import Job
from exporter.planning.recipe import Recipe
from exporter.targets.contract import load_target
from tests.models import tiny_model

FREED = """
import sys
import numpy as np
from exporter.foundation.allocator import give_back_freed_memory, keep_freed_memory
from exporter.stages.stage_times import resident_bytes
keep_freed_memory()
before = resident_bytes()
kept = [(np.ones(16 << 20, np.uint8), np.ones(64 << 10, np.uint8)) for _ in range(16)]
kept = [small for _, small in kept]
if sys.argv[1] == "True":
    give_back_freed_memory()
print(resident_bytes() - before)
"""


def recipe(level: str = "balanced", **spends: int) -> Recipe:
    return Recipe(None, "nothing", (), level, replace(effort(level), **spends))


def left_after_freeing(giving_back: bool) -> int:
    command = [sys.executable, "-c", FREED, str(giving_back)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is set")
def test_freed_blocks_are_kept_until_they_are_given_back() -> None:
    assert left_after_freeing(False) > 128 << 20
    assert left_after_freeing(True) < 32 << 20


def test_the_cache_of_statistics_is_as_large_as_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))
    text = Path("text")
    job = Job("model", "device", calibration=text, evaluation=text, window=16)
    windows = Windows.of(np.random.default_rng(0).integers(0, 300, (6, 16)), "file", 0)
    with open_model(str(tiny_model(tmp_path / "model", hidden=256, intermediate=768))) as model:
        for count in (4, 6):
            collect(model, windows.spread(count), 0, silent)
        predicted, hidden = cache_bytes(model, job, recipe(calibration_windows=4)), 4 * 16 * 256 * ((4 + 6) * 5 + 6)
        sampled = cache_bytes(model, replace(job, evaluation=None), recipe(calibration_windows=4))
        assert sampled == predicted + 34 * model.decoder.parameters // 32
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    # Small files stand beside the second moments; hidden states are gone by now.
    assert predicted - hidden <= kept <= 1.1 * (predicted - hidden)


def test_memory_grows_with_what_is_held(tmp_path: Path) -> None:
    job = Job("model", "device")
    peaks = []
    for name, hidden, intermediate in (("small", 64, 96), ("wide", 64, 4096), ("large", 128, 8192)):
        with open_model(str(tiny_model(tmp_path / name, hidden=hidden, intermediate=intermediate))) as model:
            peaks.append(build_peak_bytes(model, job, recipe(), [], 0, 0))
            assert build_peak_bytes(model, job, recipe(), [], 4 << 30, 1 << 30) > 5 << 30
    assert sorted(peaks) == peaks
    # Two second moments of the widest site in float32, and their sums beside it.
    assert peaks[2] - peaks[0] > 2 * 4 * 8192**2


def test_memory_of_correction_counts_where_matrices_are_corrected(tmp_path: Path) -> None:
    job = Job("model", "device", evaluation_windows=1)
    target = load_target("gguf")
    with open_model(str(tiny_model(tmp_path / "model", hidden=256, intermediate=768))) as model:
        peaks = {
            name: build_peak_bytes(model, job, recipe("max"), target.decide(model, *name), 0, 0)
            for name in (("Q4_0", "ldlq"), ("Q4_0", "rtn"), ("F16", "ldlq"))
        }
    assert peaks["Q4_0", "ldlq"] > peaks["Q4_0", "rtn"] == peaks["F16", "ldlq"]
