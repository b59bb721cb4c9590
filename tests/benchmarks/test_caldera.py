"""CALDERA on the reference model: KL against bits of the layers' matrices, beside what the bits buy otherwise.

    .venv/bin/python -m pytest tests/benchmarks/test_caldera.py --timeout=0 -s

prints two tables. The lowered form runs in its real runtime, with the embedding in 8 bits everywhere; its rivals are
plain error feedback in the same format, in mixes of the target's formats that the exporter allocates to the same bytes,
and rounding to nearest. The published form is simulated: its dense weights replace those of the float model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import file_windows, spread_windows
from exporter.compress.allocate import Choice, Limits, allocate, predicted_choices
from exporter.compress.checks import with_factors
from exporter.compress.compression import Compression
from exporter.compress.effort import effort
from exporter.compress.method import load_method
from exporter.compress.reference.caldera import CalderaOptions, decompose
from exporter.compress.reference.rounders import EntropyCoded
from exporter.formats.format import Float32
from exporter.formats.group import Decision, WeightGroup
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Distance, Reference, dequantised, distance
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, low_rank, lower
from exporter.targets.opened import OpenedArtifact
from tests.benchmarks.measured import THREADS, WINDOW
from tests.llama_names import LINEARS
from tests.reference import plain_texts, reference_model

SEED = 0
EVALUATION_WINDOWS = 8
EMBEDDING = {"onnx": "int8-b32", "gguf": "Q8_0"}
PROMPT = 256
FEED_FORWARD = ("gate", "up", "down")
QUICK = CalderaOptions(iterations=2, factor_iterations=3, order=("Q", "LR"))


@dataclass(frozen=True)
class Row:
    """What was measured: bits a weight of the layers' matrices, mean KL in nats, share of the same first token."""

    name: str
    bits: float
    kl: float
    top1: float


class Bench:
    """The model, its statistics, and its own answers on prose that was not calibrated on."""

    def __init__(self, model: Model, scratch: Path, windows: int = EVALUATION_WINDOWS) -> None:
        prose, evaluation = plain_texts(scratch)
        tokenizer = load_tokenizer(model.folder)
        self.model, self._scratch = model, scratch
        calibration = spread_windows(prose, tokenizer, effort("balanced").calibration_windows, WINDOW)
        self._tokens = file_windows(evaluation, tokenizer, windows, WINDOW).tokens
        self._statistics = collect(model, calibration, SEED, lambda done, total: None)
        self._original = Reference.of_original(model, self._tokens)
        self._choices: dict[str, list[list[Choice]]] = {}
        self._artifacts: dict[str, Artifact] = {}

    def _groups(self) -> list[WeightGroup]:
        return [group for group in self.model.groups() if group.layer is not None]

    def lowered(
        self, target: str, type: str, rank: int = 0, bits: int = 4, roles: tuple[str, ...] = (*LINEARS,),
        method: str = "ldlq",
    ) -> Row:  # fmt: skip
        """Measure one type for all matrices, with factors beside those of some roles."""
        made = load_target(target)
        decisions = made.decide(self.model, type, method)
        if rank:
            decisions = with_factors(decisions, low_rank(made, rank, bits), roles)
        some = "" if len(roles) == len(LINEARS) else " beside the feed-forward"
        return self._measured(
            target, decisions, f"{type} {method}" + (f", rank {rank} x {bits} bits{some}" * (rank > 0))
        )

    def mixed(self, target: str, bits: float) -> Row:
        """Measure plain error feedback in the formats that the exporter allocates to so many bits."""
        made, method = load_target(target), load_method("ldlq", effort("balanced"))
        storages = [one for one in made.storages(self.model) if one.groups[0].layer is not None]
        if target not in self._choices:
            self._choices[target] = predicted_choices(
                self.model, storages, method, self._statistics, lambda done, total: None
            )
        room = bits / 8 * sum(group.size for group in self._groups())
        best = allocate(self._choices[target], Limits(bytes=room))
        assert best is not None
        chosen = {
            group.name: Decision(group, "ldlq", choice.format, "allocated")
            for storage, choice in zip(storages, best, strict=True)
            for group in storage.groups
        }
        embedding = made.decide(self.model, EMBEDDING[target], "ldlq")
        return self._measured(
            target, [chosen.get(one.group.name, one) for one in embedding], f"mix of {bits:g} bits, ldlq"
        )

    def merged(self, row: Row, type: str) -> Row:
        """Measure the sums Q + L R of an artifact, each as one matrix of another type, rounded to nearest."""
        artifact = self._artifacts[row.name]
        target = load_target(artifact.target)
        model = dequantised(self.model, target.read_back(artifact, self.model))
        decisions = target.decide(self.model, type, "rtn")
        return self._measured(artifact.target, decisions, f"{row.name} merged into {type}", model)

    def speed(self, row: Row) -> None:
        """Print how quickly an artifact runs."""
        prompt = self._tokens.reshape(-1)[:PROMPT].tolist()
        with OpenedArtifact(self._artifacts[row.name], 2 * PROMPT, THREADS) as child:
            timing = child.measure(prompt, 32, 5)
        speeds = f"prefill {timing.prefill_tokens_per_s:6.0f}, decode {timing.decode_tokens_per_s:6.1f} tokens/s"
        print(f"  {speeds}, {timing.peak_bytes:,} bytes at most  {row.name}", flush=True)

    def _measured(self, target: str, decisions: list[Decision], name: str, model: Model | None = None) -> Row:
        made = load_target(target)
        fine = {one.group.name: one for one in made.decide(self.model, EMBEDDING[target], "ldlq")}
        decisions = [one if one.group.layer is not None else fine[one.group.name] for one in decisions]
        folder = self._scratch / f"{len(self._artifacts)}"
        folder.mkdir()
        compressed = Compression(model or self.model, decisions, self._statistics)
        artifact = self._artifacts[f"{target} {name}"] = lower(made, compressed, "mixed", folder).artifact
        with OpenedArtifact(artifact, WINDOW, THREADS) as child:
            found = distance(self._original, child.logits)
        layers = [one for one in decisions if one.group.layer is not None]
        bits = 8 * sum(one.stored_bytes for one in layers) / sum(one.group.size for one in layers)
        return self._row(f"{target} {name}", bits, found)

    def published(self, name: str, options: CalderaOptions, plain: bool = False) -> Row:
        """Measure the published form; `plain` rounds without regard to the inputs."""
        taken: list[float] = []

        def read(group: WeightGroup) -> Float32:
            weight = self.model.read(group.name)
            if group.layer is None:
                return weight
            site = self._statistics.site(group.site)
            assert site is not None
            moment = np.eye(group.columns, dtype=np.float32) if plain else site.second_moment
            made = decompose(weight, moment, options)
            taken.append(made.bits * group.size)
            return made.planned

        own = Reference.of(dequantised(self.model, read), self._tokens)
        windows = [window.tolist() for window in self._tokens]
        found = distance(
            self._original, lambda tokens, first: own.logits(windows.index(tokens), slice(first, None)).numpy()
        )
        return self._row(name, sum(taken) / sum(group.size for group in self._groups()), found)

    @staticmethod
    def _row(name: str, bits: float, found: Distance) -> Row:
        row = Row(name, bits, found.kl_mean, found.top1_agreement)
        print(f"  {row.bits:6.3f} bits  KL {row.kl:8.4f}  {row.top1:6.1%}  {row.name}", flush=True)
        return row


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = reference_model(tmp_path_factory.mktemp("reference") / "model")
    with open_model(str(folder)) as model:
        yield Bench(model, tmp_path_factory.mktemp("bench"))


def test_the_lowered_form(bench: Bench) -> None:
    print("\nthe lowered form in its runtime")
    nearest = bench.lowered("onnx", "int2-b64", method="rtn")
    alone = bench.lowered("onnx", "int2-b64")
    ranks = [bench.lowered("onnx", "int2-b64", rank) for rank in (32, 64)]
    finer = [
        bench.lowered("onnx", "int2-b64", 32, roles=FEED_FORWARD),
        bench.lowered("onnx", "int2-b32", 32, roles=FEED_FORWARD),
        bench.lowered("onnx", "int2-b32", 64),
    ]
    mixes = [bench.mixed("onnx", row.bits) for row in (*ranks, *finer)]
    bench.lowered("onnx", "int2-b32")
    bench.lowered("onnx", "int2-b16")
    four = bench.lowered("gguf", "Q4_0")
    beside = [bench.lowered("gguf", "Q4_0", 32, bits) for bits in (4, 8)]
    mixes += [bench.mixed("gguf", row.bits) for row in beside]
    bench.merged(beside[0], "Q8_0")
    for row in (alone, ranks[0], four, *beside):
        bench.speed(row)
    # Rank helps at equal bits of Q; whether it pays is for the table to say.
    assert nearest.kl > alone.kl > ranks[0].kl > ranks[1].kl
    assert all(row.kl < four.kl for row in beside)
    print("  low rank over an allocated mix of the same bits:", end="")
    print(*(f" {row.kl / mix.kl:.2f}" for row, mix in zip((*ranks, *finer, *beside), mixes, strict=True)))


def test_the_published_form(bench: Bench) -> None:
    print("\nthe published form, simulated")
    nearest = bench.published("E8P without feedback", replace(QUICK, rank=0), plain=True)
    alone = bench.published("E8P, LDLQ", replace(QUICK, rank=0))
    ranks = [bench.published(f"E8P, rank {rank} x 4 bits", replace(QUICK, rank=rank)) for rank in (17, 35, 87)]
    scalar = [bench.published(f"scalar, rank {r}", replace(QUICK, rank=r, rounder=EntropyCoded(2.0))) for r in (17, 87)]
    for bits in (2.0, *(row.bits for row in ranks)):
        bench.published("entropy-coded scalar, LDLQ", replace(QUICK, rank=0, rounder=EntropyCoded(bits)))
    bench.published("E8P, rank 35, LR first", replace(QUICK, rank=35, order=("LR", "Q")))
    bench.published("E8P, rank 35, 8 outliers", replace(QUICK, rank=35, outliers=8))
    assert nearest.kl > alone.kl > ranks[0].kl > ranks[1].kl > ranks[2].kl
    assert scalar[0].kl > scalar[1].kl
