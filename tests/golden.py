"""Compare what two commits build: every model file byte by byte, and every decision.

    python tests/golden.py BASE [--only TEXT]     as `make golden BASE=COMMIT ONLY=TEXT` calls it

Both commits build the jobs of golden.toml on this machine, one beside the other, from the same models and texts. The
new one is the working tree, uncommitted changes included.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
JOBS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
WORDS = "the capital of France is Paris, numbers 12 345 6789 and hello world. it's a test of   spaces. "
# What the wheel holds, and where: see package-dir in pyproject.toml.
PACKAGES = {"exporter": "exporter", "targets": "exporter/targets", "devices": "exporter/devices"}
# What a decision is, whatever else a row of the report says.
DECISION = ("name", "format", "method", "stored_bytes")


def main() -> None:
    """Build all jobs with both commits and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--only", default="", help="jobs whose name contains this text")
    asked = parser.parse_args()
    jobs = {name: job for name, job in all_jobs().items() if asked.only in name}
    with TemporaryDirectory(prefix="golden-") as folder:
        work = Path(folder)
        make_inputs(work)
        lay_out_commit(asked.base, work / "base")
        lay_out_tree(work / "new")
        building = [start(work, side, jobs) for side in ("base", "new")]
        failed = [side.wait() for side in building]
        if any(failed):
            sys.exit("golden: a job failed; see above")
        differences = {name: compared(work, name) for name in jobs}
    for name, found in differences.items():
        print(f"{name}: {'; '.join(found) or 'equal'}")
    differing = sum(map(bool, differences.values()))
    print(f"golden: {len(jobs)} jobs, {differing} differ from {asked.base}")
    sys.exit(differing > 0)


def all_jobs() -> dict[str, list[str]]:
    """Return the arguments of `edge-exporter build` for each job, but for its output."""
    common = ["--calibration", "text.txt", "--evaluation", "text.txt", *JOBS["common"]["options"]]
    return {
        f"{target}-{name}": [f"models/{model}", "-d", JOBS["common"]["device"], "-t", target, *common, *options]
        for target, jobs in JOBS["jobs"].items()
        for name, (model, *options) in jobs.items()
    }


def make_inputs(work: Path) -> None:
    """Write the models and the text that both commits build from."""
    sys.path.insert(0, str(ROOT))
    from transformers.utils import logging

    from tests.models import tiny_model

    logging.disable_progress_bar()
    for name, options in JOBS["models"].items():
        tiny_model(work / "models" / name, **options)
    (work / "text.txt").write_text(WORDS * 250)


def lay_out_commit(commit: str, place: Path) -> None:
    """Write a commit's packages as the wheel has them."""
    done = subprocess.run(["git", "archive", commit, *PACKAGES], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"golden: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(place / "commit", filter="data")
    _lay_out(place / "commit", place)


def lay_out_tree(place: Path) -> None:
    """Write the working tree's packages as the wheel has them."""
    _lay_out(ROOT, place)


def _lay_out(source: Path, place: Path) -> None:
    for name, inside in PACKAGES.items():
        shutil.copytree(source / name, place / inside, ignore=shutil.ignore_patterns("__pycache__"))


def start(work: Path, side: str, jobs: dict[str, list[str]]) -> "subprocess.Popen[bytes]":
    """Build all jobs with one commit's code, in a process that sees no other."""
    asked = [[*job, "-o", f"{side}/bundles/{name}", "--json"] for name, job in jobs.items()]
    (work / side / "bundles").mkdir()
    own = {"PYTHONPATH": str(work / side), "PYTHONSAFEPATH": "1", "EDGE_EXPORTER_CACHE": str(work / side / "cache")}
    command = [sys.executable, "-c", BUILD, side, json.dumps(asked)]
    return subprocess.Popen(command, cwd=work, env=os.environ | own)


# One process for all jobs: loading the libraries takes longer than most of them. A failed check is exit status 1.
BUILD = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from exporter.cli import main as commands
side, jobs = sys.argv[1], json.loads(sys.argv[2])
if __name__ == "__main__":
    for number, job in enumerate(jobs, 1):
        began = time.perf_counter()
        sys.argv[1:] = ["build", *job]
        sys.stdout = open(os.devnull, "w")
        try:
            commands.main()
        except SystemExit as end:
            if end.code not in (None, 0, 1):
                sys.exit(f"golden: {side}: edge-exporter build {' '.join(job)}: exit status {end.code}")
        took = time.perf_counter() - began
        print(f"{side} {number}/{len(jobs)}: {took:.1f} s, {job[-2]}", file=sys.stderr, flush=True)
"""


def compared(work: Path, name: str) -> list[str]:
    """Return how a job's bundles differ; empty where model files and decisions are equal."""
    base, new = (work / side / "bundles" / name for side in ("base", "new"))
    before, after = digests(base / "model"), digests(new / "model")
    found = [
        f"model/{path} differs" for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)
    ]
    rows, others = decisions(base), decisions(new)
    found += [f"decided otherwise on {row['name']}" for row, other in zip(rows, others, strict=False) if row != other]
    return found + (["another number of decisions"] if len(rows) != len(others) else [])


def digests(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of the files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def decisions(bundle: Path) -> list[dict[str, Any]]:
    """Return what a bundle's report says was decided, matrix by matrix."""
    rows = json.loads((bundle / "report.json").read_text())["tensors"]
    return [{key: row[key] for key in DECISION} for row in rows]


if __name__ == "__main__":
    main()
