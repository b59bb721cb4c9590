"""A target that has the required members alone: it is planned and lowered, and refuses what it does not have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.foundation.errors import RequestError
from exporter.targets.contract import budgeted, by_bits, load_target
from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
OPTIONS = ("-d", "raspberry-pi-5", "-t", "toy", "--context", "64")
LOWERED = """
from pathlib import Path
import numpy as np
from exporter.compress.compression import Compression
from exporter.model.sources import open_model
from exporter.targets.contract import load_target, lower
target, folder = load_target("toy"), Path("lowered")
folder.mkdir()
with open_model("model") as model:
    decisions = target.decide(model, "F16", "rtn")
    artifact = lower(target, Compression(model, decisions), "F16", folder).artifact
    read = target.read_back(artifact, model)
    for group in model.groups():
        np.testing.assert_array_equal(read(group), model.read(group.name).astype(np.float16))
    assert artifact.file_bytes == target.estimated_file_bytes(model, decisions)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, and with the packages and the toy target beside them."""
    folder = tmp_path_factory.mktemp("toy")
    tiny_model(folder / "model")
    for name, inside in (("exporter", "exporter"), ("targets", "exporter/targets"), ("devices", "exporter/devices")):
        shutil.copytree(ROOT / name, folder / "site" / inside, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests/toy_target", folder / "site/exporter/targets/toy")
    return folder


def run(world: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, (str(world / "site"), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "EDGE_EXPORTER_CACHE": str(world / "cache")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=world, env=os.environ | own, capture_output=True, text=True, check=False
    )


def plan(world: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return run(world, "-m", "exporter.cli.main", "plan", "model", *OPTIONS, *options)


def test_it_is_planned(world: Path) -> None:
    done = plan(world, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert {one["format"] for one in planned["decisions"]} == {"F16"}
    assert planned["file_bytes"]["value"] == sum(one["bytes"] for one in planned["decisions"])


def test_it_is_lowered_and_read_back(world: Path) -> None:
    done = run(world, "-c", LOWERED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bits", "4"), "the target toy has no budgets; expected a type for all matrices; name one with --type"),
        (("--recipe", "caldera"), "the target toy names no formats by their bits"),
    ],
)
def test_what_it_does_not_have_is_refused_in_a_sentence(world: Path, options: tuple[str, ...], message: str) -> None:
    done = plan(world, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in " ".join(done.stderr.split())


def test_the_targets_of_this_repository_have_both() -> None:
    for name in ("gguf", "onnx", "onnx-qdq"):
        target = load_target(name)
        assert budgeted(target) is by_bits(target) is target
    with pytest.raises(RequestError, match="no budgets"):
        budgeted(object.__new__(type("Bare", (), {"name": "bare", "default_type": "F16"})))
