"""A family, a target, a step and a device are one file each: put into their folders, they are built with.

The packages are copied to a temporary folder, and the files added there. No other file is changed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import SeedOssConfig, SeedOssForCausalLM

from tests.models import tiny_model

ROOT = Path(__file__).parents[2]
PACKAGES = {"exporter": "exporter", "targets": "exporter/targets", "devices": "exporter/devices"}
PLACES = {
    "seed_oss.py": "exporter/model/families/seed_oss.py",
    "target.py": "exporter/targets/toy/target.py",
    "every_second.py": "exporter/steps/every_second.py",
    "toy-board.toml": "exporter/devices/toy-board.toml",
}
RECIPE = """schema_version = 1
title = "Every second layer in more bits"

[[step]]
method = "every-second"
even = "{0}"
rest = "{1}"
"""
TEXT = "The quick brown fox jumps over the lazy dog, and 12 more of them follow it. "


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, a text and recipes, and with the packages and the four files in `site`."""
    folder = tmp_path_factory.mktemp("world")
    for name, inside in PACKAGES.items():
        shutil.copytree(ROOT / name, folder / "site" / inside, ignore=shutil.ignore_patterns("__pycache__"))
    for file, place in PLACES.items():
        (folder / "site" / place).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests/one_file" / file, folder / "site" / place)
    tiny_model(folder / "llama")
    tiny_model(folder / "seed", kind=(SeedOssConfig, SeedOssForCausalLM), changes={"attention_out_bias": False})
    (folder / "text.txt").write_text(TEXT * 200)
    for name, types in (("gguf", ("Q8_0", "F16")), ("toy", ("F32", "F16"))):
        (folder / f"{name}.toml").write_text(RECIPE.format(*types))
    return folder


def run(world: Path, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, (str(world / "site"), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "EDGE_EXPORTER_CACHE": str(world / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "exporter.cli.main", command, *arguments, "--json"],
        cwd=world, env=os.environ | own, capture_output=True, text=True, check=False,
    )  # fmt: skip


OPTIONS = ("-d", "toy-board", "--context", "64")


@pytest.mark.parametrize(
    ("model", "target", "stored"), [("seed", "gguf", {"Q8_0", "F16"}), ("llama", "toy", {"F32", "F16"})]
)
def test_each_is_found_planned_and_built_with(world: Path, model: str, target: str, stored: set[str]) -> None:
    options = (model, *OPTIONS, "-t", target, "--recipe", f"{target}.toml")
    planned = run(world, "plan", *options)
    assert planned.returncode == 0, planned.stderr
    assert {one["format"] for one in json.loads(planned.stdout)["decisions"]} == stored
    texts = ("--calibration", "text.txt", "--evaluation", "text.txt")
    built = run(world, "build", *options, *texts, "--effort", "fast", "-o", f"bundle-{target}")
    assert built.returncode in (0, 1), built.stderr
    report = json.loads((world / f"bundle-{target}" / "report.json").read_text())
    assert {one["format"] for one in report["tensors"]} == stored
    assert report["device"] == "toy-board"
    checks = {one["name"]: one["status"] for one in report["checks"]}
    assert {name: checks[name] for name in ("lowering", "lowering.weights", "lowering.formats")} == dict.fromkeys(
        ("lowering", "lowering.weights", "lowering.formats"), "passed"
    )
    assert [status for name, status in checks.items() if name.startswith("parity.tokenizer.")] == ["passed"]
    verified = run(world, "verify", f"bundle-{target}")
    assert verified.returncode == 0, verified.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("llama", "-t", "toy", "--bits", "4"), "the target toy has no budgets; expected a type for all matrices"),
        (("llama", "-t", "toy", "--recipe", "caldera"), "the target toy names no formats by their bits"),
        (("seed", "-t", "onnx"), "builder does not build this family; use --target gguf"),
    ],
)
def test_what_a_file_does_not_have_is_refused_in_a_sentence(
    world: Path, options: tuple[str, ...], message: str
) -> None:
    done = run(world, "plan", *options, *OPTIONS)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert message in " ".join((done.stderr + done.stdout).split())
