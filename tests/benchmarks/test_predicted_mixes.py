"""Decoding predicted from the kernels that `bench --kernels` times here, against six mixes measured in llama.cpp.

    .venv/bin/python -m pytest tests/benchmarks/test_predicted_mixes.py --timeout=0 -s

The kernels are timed before and after the mixes, which are timed by turns, and a prediction is the mean of both, so
that what else happens to the machine happens to all. The prices of a budget are those of the products alone: what a
token takes beside them is taken from the mixes' median, and stands apart. `predict` knows the file's bytes, its weights
and the mix's name: it is shown, and is not held to a limit, since a model whose width is no multiple of 256 has other
types than the mix is named after.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from tempfile import mkdtemp

import pytest

from exporter.bench import kernels
from exporter.bench.kernels import kernels_here, program_path, write_profile
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import file_windows
from exporter.compress.compression import Compression
from exporter.device.connect.local import Local
from exporter.device.connect.machine import read_machine
from exporter.device.profile import DeviceProfile, load_device
from exporter.formats.group import Decision
from exporter.model.decoder import TOKENS
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.predict.rates import rates
from exporter.predict.request import Request, checked_request
from exporter.targets.artifact import Artifact
from exporter.targets.contract import budgeted, load_target, lower
from exporter.targets.kernel_program import kernel_program
from tests.benchmarks.measured import THREADS, by_turns
from tests.benchmarks.ours import silent
from tests.models import VOCAB
from tests.reference import plain_texts

MIXES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q8_0")
# A profile of another processor of this kind, without runs on its CPU.
DEVICE = "core-i7-1185g7"
PROMPT, DECODE, LOADS, ROUNDS, TURNS = 64, 32, 3, 5, 5
WITHIN = 0.1


# Read before the tests get a cache of their own: what was compiled before is taken from there.
COMPILED = program_path(kernel_program(), "x86_64", read_machine(Local()).features)


def test_six_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if COMPILED.is_file():
        monkeypatch.setattr(kernels, "built", lambda *_: COMPILED)
    with open_model("demo") as model:
        target = load_target("gguf")
        text, _ = plain_texts(tmp_path)
        statistics = collect(model, file_windows(text, load_tokenizer(model.folder), 4, 32), 0, silent)
        decided = {mix: target.decide(model, mix, "rtn") for mix in MIXES}
        made = [_made(model, statistics, mix, decided[mix], tmp_path) for mix in MIXES]
        profiles = [_timed(tmp_path / "before.toml")]
        rounds = by_turns(made, [token % VOCAB for token in range(PROMPT)], DECODE, LOADS, ROUNDS)
        profiles.append(_timed(tmp_path / "after.toml"))
        measured = [median(1 / round[i].decode_tokens_per_s for round in rounds) for i in range(len(MIXES))]
        products = [fmean(_products_s(profile, decided[mix]) for profile in profiles) for mix in MIXES]
        beside = median(taken - known for taken, known in zip(measured, products, strict=True))
        weights = model.decoder.active_parameters
        predicted = [
            fmean(1 / _predicted(profile, mix, one.file_bytes, weights) for profile in profiles)
            for mix, one in zip(MIXES, made, strict=True)
        ]
    far: dict[str, list[float]] = {"products": [], "predict": []}
    print(f"\n{1e3 * beside:.2f} ms of a token are no products")
    for mix, taken, known, expected in zip(MIXES, measured, products, predicted, strict=True):
        far["products"].append(abs((known + beside) / taken - 1))
        far["predict"].append(abs(expected / taken - 1))
        print(
            f"  {mix:7} measured {1 / taken:6.1f} tokens/s, products and rest {1 / (known + beside):6.1f}, "
            f"predict {1 / expected:6.1f}, of the products alone {1 / known:6.1f}",
            flush=True,
        )
    print(", ".join(f"{name}: median error {median(errors):.1%}" for name, errors in far.items()))
    assert median(far["products"]) <= WITHIN


def _made(model: Model, statistics: Statistics, mix: str, decisions: Sequence[Decision], folder: Path) -> Artifact:
    target = load_target("gguf")
    return lower(target, Compression(model, list(decisions), statistics), mix, Path(mkdtemp(dir=folder))).artifact


def _timed(path: Path) -> DeviceProfile:
    found = kernels_here(None, THREADS, TURNS)
    print(f"spread of the kernels' times: at most {found.spread:.0%}", flush=True)
    write_profile(found, DEVICE, path)
    return load_device(str(path))


def _products_s(profile: DeviceProfile, decisions: Sequence[Decision]) -> float:
    """Return the seconds of a token's products, as a budget prices them."""
    target = budgeted(load_target("gguf").on(profile))
    cpu = target.processor(profile)
    products = [one for one in decisions if one.group.site != TOKENS]
    return sum(
        cpu.decode_s(one.group.size, one.stored_bytes, target.throughput(one.group, one.format))
        for one in products
    )  # fmt: skip


def _predicted(profile: DeviceProfile, mix: str, file_bytes: int, parameters: int) -> float:
    request = Request(file_bytes, parameters, mix, "cpu", context=PROMPT + DECODE // 2, prompt=PROMPT)
    return rates(profile, checked_request(request, profile)).decode.value
