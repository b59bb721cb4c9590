"""Time: ours against llama.cpp's own chain of tools from the same files, and the speed of what either makes.

    .venv/bin/python -m pytest tests/benchmarks/test_stock_chain.py --timeout=0 -s

The tools come from the source archive of llama-cpp-python, which pip downloads and cmake compiles into build/ the first
time, which takes minutes. Times hold for an otherwise idle machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import pytest

from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.compress.effort import EFFORTS, effort
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.planning.job import Job
from exporter.prove.accuracy import Reference
from exporter.targets.artifact import Artifact
from tests.benchmarks import llama_opponents, onnx_opponents
from tests.benchmarks.measured import THREADS, WINDOW, by_turns, measured
from tests.benchmarks.ours import Exporter
from tests.commands import ROOT, printed
from tests.reference import plain_texts, reference_model

PACKAGE = f"llama-cpp-python=={version('llama-cpp-python')}"
CACHE = ROOT / "build" / "stock-chain"
OPTIONS = ("GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_SERVER=OFF")
MIX = "Q4_K_M"
# Of 512 tokens each: what llama-imatrix reads of the calibration text.
CHUNKS = 60
# Most of ours over the stock chain's wall time; what it lacks, all that is done with the evaluation text, not counted.
# Nothing is promised of `max`: what it takes is printed beside the others.
CHAIN_LIMITS = {"fast": 1.2, "balanced": 3.0, "max": float("inf")}
NOT_IN_THE_CHAIN = ("predict", "prove")
DECODE_AT_LEAST, PREFILL_AT_LEAST = 1.0, 0.9
QUICK_PREFILL_AT_LEAST = 1.1
PROMPT, DECODE, LOADS, ROUNDS = 256, 32, 12, 2
EVALUATION_WINDOWS = 8


@dataclass(frozen=True)
class Tools:
    """llama.cpp's own tools: the converter lies in the source, the others are compiled."""

    source: Path
    binaries: Path


@pytest.fixture(scope="module")
def tools() -> Tools:
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / PACKAGE.replace("==", "-").replace("-", "_", 2)
    found = Tools(folder / "vendor" / "llama.cpp", CACHE / "tools" / "bin")
    if not found.source.is_dir():
        _run(sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-d", CACHE, PACKAGE)
        with tarfile.open(folder.with_name(f"{folder.name}.tar.gz")) as archive:
            archive.extractall(CACHE, filter="data")
    compiled = ("llama-imatrix", "llama-quantize")
    if not all((found.binaries / name).is_file() for name in compiled):
        defined = [f"-D{option}" for option in (*OPTIONS, "BUILD_SHARED_LIBS=OFF", "CMAKE_BUILD_TYPE=Release")]
        _run("cmake", "-S", found.source, "-B", CACHE / "tools", *defined)
        _run("cmake", "--build", CACHE / "tools", f"-j{os.cpu_count()}", "--target", *compiled)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference_model(tmp_path_factory.mktemp("reference") / "model")


def _run(*command: object) -> float:
    """Run a command that must succeed and return its seconds."""
    started = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.perf_counter() - started


@dataclass(frozen=True)
class Chain:
    """What the stock chain took, and the bytes of what it made."""

    seconds: float
    file_bytes: int


@pytest.fixture(scope="module")
def chain(tools: Tools, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Convert, collect importance, quantise."""
    scratch = tmp_path_factory.mktemp("chain")
    calibration, _ = plain_texts(scratch)
    floats, importance, made = scratch / "f32.gguf", scratch / "imatrix.gguf", scratch / f"{MIX}.gguf"
    seconds = {
        "convert": _run(
            sys.executable, tools.source / "convert_hf_to_gguf.py", folder, "--outtype", "f32", "--outfile", floats
        ),
        "imatrix": _run(
            tools.binaries / "llama-imatrix", "-m", floats, "-f", calibration, "-o", importance,
            "--chunks", CHUNKS, "-c", WINDOW, "-t", THREADS,
        ),
        "quantize": _run(
            tools.binaries / "llama-quantize", "--imatrix", importance, floats, made, MIX, THREADS
        ),
    }  # fmt: skip
    whole = sum(seconds.values())
    print(f"\nstock chain: {whole:.0f} s; " + ", ".join(f"{part} {took:.1f}" for part, took in seconds.items()))
    return Chain(whole, made.stat().st_size)


@pytest.mark.parametrize("name", CHAIN_LIMITS)
def test_wall_time_against_the_stock_chain(chain: Chain, folder: Path, tmp_path: Path, name: str) -> None:
    calibration, evaluation = plain_texts(tmp_path)
    started = time.perf_counter()
    printed(
        tmp_path, "build", str(folder), "--device", "galaxy-s24-ultra", "--target", "gguf", "--effort", name,
        "--max-file-bytes", str(chain.file_bytes), "--calibration", str(calibration),
        "--evaluation", str(evaluation), "-o", "bundle",
    )  # fmt: skip
    whole = time.perf_counter() - started
    stages = json.loads((tmp_path / "bundle/measurements.json").read_text("utf-8"))["stages"]
    kl = json.loads((tmp_path / "bundle/report.json").read_text("utf-8"))["accuracy"]["kl_mean"]["value"]
    spent = EFFORTS[name]
    seen = min(spent.prediction_windows, Job("").evaluation_windows)
    # Both texts go through the model together: the evaluation text's windows, too, are what the chain lacks.
    parts = {"statistics": spent.calibration_windows / (spent.calibration_windows + seen)}
    taken = sum(
        parts.get(stage["name"], 1.0) * stage["seconds"] for stage in stages if stage["name"] not in NOT_IN_THE_CHAIN
    )
    share = taken / chain.seconds
    print(f"\n{name}: {taken:.0f} s, {share:.2f} of the chain; {whole:.0f} s with what it lacks; KL {kl:.4f}")
    for stage in stages:
        print(f"  {stage['name']:20} {stage['seconds']:7.1f}")
    assert share <= CHAIN_LIMITS[name]


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with open_model(str(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def calibration(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    prose, _ = plain_texts(tmp_path_factory.mktemp("texts"))
    return spread_windows(prose, load_tokenizer(model.folder), effort("balanced").calibration_windows, WINDOW)


@dataclass(frozen=True)
class Speed:
    """Tokens a second of ours, and over those of the opponent: medians over rounds, in each of which both ran."""

    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:7.0f}, ratio {self.prefill_ratio:.3f}; "
            f"decode {self.decode:6.1f}, ratio {self.decode_ratio:.3f}"
        )


def speed(ours: Artifact, opponent: Artifact, prompt: list[int]) -> Speed:
    """Time two artifacts by turns."""
    rounds = by_turns([ours, opponent], prompt, DECODE, LOADS, ROUNDS)
    return Speed(
        median(own.prefill_tokens_per_s for own, _ in rounds),
        median(own.decode_tokens_per_s for own, _ in rounds),
        median(own.prefill_tokens_per_s / other.prefill_tokens_per_s for own, other in rounds),
        median(own.decode_tokens_per_s / other.decode_tokens_per_s for own, other in rounds),
    )


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_ours_is_no_slower_than_stock_of_the_same_size(
    model: Model, calibration: Windows, tmp_path: Path, target: str
) -> None:
    # Which formats matrices have decides the speed, not how well their codes were chosen.
    exporter = Exporter(model, target, calibration, calibration, "fast")
    prompt = calibration.tokens[0, :PROMPT].tolist()
    slower = []
    print(f"\n{target}: tokens a second, {PROMPT} prefilled and {DECODE} decoded, {LOADS * ROUNDS} rounds by turns")
    for name, stock in stock_artifacts(model, calibration, target, tmp_path):
        ours = exporter.made(stock.file_bytes, tmp_path / "ours").artifact
        found = speed(ours, stock, prompt)
        for artifact in (ours, stock):
            shutil.rmtree(artifact.folder)
        print(f"  {name:36} {found}", flush=True)
        if found.prefill_ratio < PREFILL_AT_LEAST or found.decode_ratio < DECODE_AT_LEAST:
            slower.append(name)
    assert not slower


def test_preferring_speed_reads_a_prompt_faster_than_stock_and_loses_no_more(
    model: Model, calibration: Windows, tmp_path: Path
) -> None:
    _, evaluation = plain_texts(tmp_path)
    windows = file_windows(evaluation, load_tokenizer(model.folder), EVALUATION_WINDOWS, WINDOW)
    original = Reference.of_original(model, windows.tokens)
    importance = llama_opponents.importance(model, calibration.tokens)
    floats = llama_opponents.floats(model, tmp_path / "floats")
    stock = llama_opponents.quantised(floats, tmp_path / MIX, MIX, importance)
    ours = (
        Exporter(model, "gguf", calibration, calibration)
        .made(stock.file_bytes, tmp_path / "ours", prefer="speed")
        .artifact
    )
    rows = [measured(original, artifact, name, name) for artifact, name in ((ours, "quick"), (stock, MIX))]
    found = speed(ours, stock, calibration.tokens[0, :PROMPT].tolist())
    print(f"  {found}")
    assert found.prefill_ratio >= QUICK_PREFILL_AT_LEAST
    assert rows[0].kl_mean <= rows[1].kl_mean


def stock_artifacts(model: Model, calibration: Windows, target: str, folder: Path) -> Iterator[tuple[str, Artifact]]:
    """Make what the stock tools make, one at a time; who asks for it removes it."""
    if target == "gguf":
        importance = llama_opponents.importance(model, calibration.tokens)
        floats = llama_opponents.floats(model, folder / "floats")
        for mix in llama_opponents.MIXES:
            yield mix, llama_opponents.quantised(floats, folder / mix, mix, importance)
    else:
        for name, options in onnx_opponents.SETTINGS.items():
            yield name, onnx_opponents.built(model.folder, folder / name.replace(" ", "-"), *options)
