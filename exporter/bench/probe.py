"""Measures a model on the machine to which it is sent. It is standalone: Python 3.8, numpy and the model's runtime.

    python3 -I probe.py needs               which packages of the runtime are missing
    python3 -I probe.py selftest JOB.json   the model's answers to the self-test's prompt
    python3 -I probe.py measure JOB.json    the speed of prefill and decoding

The runtime is in `session.py` beside it, the module `session` of the model's target. It prints one JSON object. Tests
are as in llama-bench: `n_prompt` tokens read at once, or `n_gen` generated one at a time, either after `n_depth` tokens
that are not timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import runpy
import signal
import site
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

SESSION = Path(__file__).with_name("session.py")
FIRST_ID, LAST_ID = 100, 300
MOST_ROUNDS = 10_000


def ids(count: int) -> list[int]:
    """Return token ids from a small range that every vocabulary has; speed does not depend on the ids."""
    return [FIRST_ID + (7919 * i + i * i) % (LAST_ID - FIRST_ID) for i in range(count)]


def resident_bytes(field: str) -> int:
    """Return this process's resident set (`VmRSS`) or its peak (`VmHWM`)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  (as plain as it goes)
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def elapsed_ns(runtime: Any, prompt: int, generate: int, depth: int) -> int:
    """Return the nanoseconds of one test."""
    # Generation starts after a token that was read, so the context needs at least one.
    runtime.start(ids(max(depth, 0 if prompt else 1)))
    tokens = ids(prompt or generate)
    started = time.perf_counter_ns()
    if prompt:
        runtime.read(tokens)
    else:
        runtime.generate(tokens)
    return time.perf_counter_ns() - started


def timed(runtime: Any, prompt: int, generate: int, job: dict[str, Any]) -> dict[str, Any]:
    """Return the repeats of a test, after a warm-up."""
    depth = job["depth"]
    elapsed_ns(runtime, prompt, generate, depth)
    begun = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    samples = [elapsed_ns(runtime, prompt, generate, depth) for _ in range(job["repeats"])]
    return {"n_prompt": prompt, "n_gen": generate, "n_depth": depth, "test_time": begun, "samples_ns": samples}


def sustained(runtime: Any, job: dict[str, Any]) -> list[int]:
    """Return the nanoseconds of each round of generation until the requested seconds are over."""
    end = time.perf_counter() + job["sustain_s"]
    rounds: list[int] = []
    while job["sustain_s"] and time.perf_counter() < end and len(rounds) < MOST_ROUNDS:
        rounds.append(elapsed_ns(runtime, 0, job["generate"], job["depth"]))
    return rounds


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return all timings."""
    before, started = resident_bytes("VmRSS"), time.perf_counter_ns()
    runtime = runpy.run_path(str(SESSION))["opened"](job, job["context"], timed=True)
    load_ns = time.perf_counter_ns() - started
    tests = [timed(runtime, job["prompt"], 0, job), timed(runtime, 0, job["generate"], job)]
    peak = resident_bytes("VmHWM")
    return {
        "runtime": runtime.runtime, **runtime.describe(), "n_batch": runtime.batch, "n_threads": job["threads"],
        "load_ns": load_ns, "interpreter_bytes": before, "peak_bytes": peak, "tests": tests,
        "sustained_ns": sustained(runtime, job),
    }  # fmt: skip


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Return the top token and its logit at each position of the self-test."""
    prompt, positions = job["self_test"]["prompt"], job["self_test"]["positions"]
    session = runpy.run_path(str(SESSION))["opened"](job, max(64, len(prompt)), timed=False)
    rows = session.logits(prompt)[positions]
    best = rows.argmax(axis=1)
    return {"tokens": best.tolist(), "logits": [float(row[token]) for row, token in zip(rows, best)]}  # noqa: B905


def needs() -> dict[str, Any]:
    """Return the packages of the runtime that are missing."""
    needed = runpy.run_path(str(SESSION))["NEEDED"]
    missing = [one for one in needed if not importlib.util.find_spec(one[0])]
    # The folders in which it would look without isolation.
    folders = [site.getusersitepackages(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    hidden = [
        f"{package} in {one}" for module, package in missing for one in folders if PathFinder.find_spec(module, [one])
    ]
    return {
        "python": sys.version.split()[0], "missing": [package for _, package in missing], "hidden": hidden,
    }  # fmt: skip


def main(command: str, *arguments: str) -> dict[str, Any]:
    """Run a command of the command line."""
    if command == "needs":
        return needs()
    with open(arguments[0], encoding="utf-8") as file:  # noqa: PTH123  (as plain as it goes)
        job = json.load(file)
    # The requester may be gone.
    signal.alarm(job["limit_s"])
    return answers(job) if command == "selftest" else measure(job)


if __name__ == "__main__":
    # Runtimes print to standard output, which is kept for the answer.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        result = main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
    with os.fdopen(answer, "w") as output:
        json.dump(result, output)
