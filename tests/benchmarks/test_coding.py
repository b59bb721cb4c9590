"""Coded files on the reference model: rates in an 8-bit container, double compression, and how soon a file is restored.

    .venv/bin/python -m pytest tests/benchmarks/test_coding.py --timeout=0 -s

Every artifact is coded, restored, and measured in llama.cpp as restored. Bits of the linears are the coded bytes of
the layers' matrices, everything that restoring them needs included. Their rivals are what the exporter allocates to as
many stored bits and CALDERA's lowered form: in ONNX, since at this model's widths GGUF has no mix below 3.9 bits.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.transport import code_beside
from exporter.calibrate.statistics import Statistics, collect
from exporter.calibrate.windows import Windows, file_windows, spread_windows
from exporter.coding.container import SUFFIX, CodedSize, code_file, restore_file
from exporter.coding.layout import FileSection
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.compression import Compression
from exporter.compress.effort import effort
from exporter.compress.method import Method
from exporter.compress.methods.coarse_int8 import coarse_int8_methods, in_scaled_channels
from exporter.compress.methods.entropy_constrained_int8 import entropy_constrained_methods, in_even_columns
from exporter.foundation.progress import silent
from exporter.model.gguf_names import gguf_names
from exporter.model.gguf_reader import open_gguf
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Reference, distance
from exporter.targets.artifact import Artifact
from exporter.targets.coded_layout import layout_of
from exporter.targets.contract import load_target, lower
from exporter.targets.opened import OpenedArtifact
from exporter.targets.runtime import Timing
from tests.benchmarks.measured import THREADS
from tests.benchmarks.test_caldera import Bench, Row
from tests.reference import plain_texts, reference_model

WINDOW = 512
EVALUATION_WINDOWS = 16
RATES = (2.0, 2.5, 3.0, 3.5)
# In all, embedding included: 8.5 bits of Q8_0 over 2.2.
DOUBLE_BITS = 3.8
PROMPT, DECODE = 64, 32
# Of the speed with all weights coded.
FLOORS = (0.9, 1.1, 2.0)


@dataclass(frozen=True)
class World:
    """The model, its statistics, and the text that is measured on."""

    model: Model
    statistics: Statistics
    evaluation: Windows
    original: Reference


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = reference_model(tmp_path_factory.mktemp("reference") / "model")
    with open_model(str(folder)) as model:
        tokenizer = load_tokenizer(model.folder)
        prose, others = plain_texts(tmp_path_factory.mktemp("texts"))
        calibration = spread_windows(prose, tokenizer, effort("balanced").calibration_windows, WINDOW)
        evaluation = file_windows(others, tokenizer, EVALUATION_WINDOWS, WINDOW)
        statistics = collect(model, calibration, 0, lambda done, total: None)
        yield World(model, statistics, evaluation, Reference.of_original(model, evaluation.tokens))


def lowered(
    world: World, rewritten: Rewritten, methods: Mapping[str, Method], folder: Path,
    name: str = "gguf", type: str = "Q8_0",
) -> Artifact:  # fmt: skip
    """Lower to 8 bits, matrices without a method of their own rounded to the nearest."""
    target = load_target(name)
    folder.mkdir()
    decisions = target.decide(world.model, type, "rtn")
    compression = Compression(rewritten.model, decisions, rewritten.statistics, methods=methods, source=world.model)
    return lower(target, compression, type, folder).artifact


def linear_bits(world: World, path: Path, scratch: Path) -> float:
    """Return the bits a weight of the layers' matrices when they alone are coded."""
    names = gguf_names(world.model.decoder)
    linears = {names[group.name] for group in world.model.groups() if group.layer is not None}
    tensors = [tensor for tensor in open_gguf(path).tensors if tensor.name in linears]
    known = {section.start: section.part for section in layout_of(path)}
    sections, at = [], 0
    with (scratch / "linears").open("wb") as file:
        for tensor in tensors:
            part = known[int(tensor.data_offset)]
            file.write(np.ascontiguousarray(tensor.data).tobytes())
            sections.append(FileSection(at, part))
            at += part.bytes
    size = code_file(scratch / "linears", scratch / "linears.coded", "small", sections)
    return 8 * size.coded_bytes / sum(int(tensor.n_elements) for tensor in tensors)


def hits(world: World, artifact: Artifact) -> tuple[float, float, float]:
    """Return mean KL, same first token, and how often the text's next token is the artifact's first."""
    half, right, count = WINDOW // 2, 0, 0
    with OpenedArtifact(artifact, WINDOW, THREADS) as child:
        found = distance(world.original, child.logits)
        for tokens in world.evaluation.tokens:
            first = child.logits(tokens.tolist(), half).argmax(-1)
            right += int((first[: WINDOW - half - 1] == tokens[half + 1 :]).sum())
            count += WINDOW - half - 1
    return found.kl_mean, found.top1_agreement, right / count


def transported(artifact: Artifact, scratch: Path, profile: str = "small") -> CodedSize:
    """Code an artifact, replace it by what is restored, and say what it took."""
    (model,) = artifact.weights
    size = code_file(model, scratch / "coded", profile, layout_of(model))  # type: ignore[arg-type]
    whole = model.read_bytes()
    model.unlink()
    restore_file(scratch / "coded", model)
    assert model.read_bytes() == whole
    return size


@pytest.fixture(scope="module")
def rivals(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Return what the same bits of the linears buy otherwise."""
    print()
    bench = Bench(world.model, tmp_path_factory.mktemp("rivals"), EVALUATION_WINDOWS)
    mixes = [bench.mixed("onnx", bits) for bits in RATES[1:]]
    factors = [
        bench.lowered("onnx", type, rank) for type, rank in (("int2-b64", 32), ("int2-b64", 64), ("int2-b32", 64))
    ]
    return [*mixes, *factors]


@pytest.mark.parametrize("bits", RATES)
def test_a_rate_of_the_linears(world: World, rivals: list[Row], tmp_path: Path, bits: float) -> None:
    rewritten = in_even_columns(world.model, world.statistics)
    linears = [group for group in world.model.groups() if group.layer is not None]
    methods = entropy_constrained_methods(rewritten.model, rewritten.statistics, linears, bits)
    artifact = lowered(world, rewritten, methods, tmp_path / "artifact")
    got = linear_bits(world, artifact.weights[0], tmp_path)
    size = transported(artifact, tmp_path)
    kl, same, _ = hits(world, artifact)
    print(f"\nrate {bits}: linears {got:.3f} bits, coded {size}, KL {kl:.4f}, same {same:.1%}")
    assert got == pytest.approx(bits, rel=0.03)
    assert size.coded_bytes <= 1.02 * size.entropy_bytes
    assert all(kl < rival.kl for rival in rivals if rival.bits <= got + 0.1)


def test_double_compression_against_its_int8(world: World, tmp_path: Path) -> None:
    plain = lowered(world, Rewritten(world.model, world.statistics), {}, tmp_path / "plain")
    rewritten = in_scaled_channels(world.model, world.statistics)
    methods = coarse_int8_methods(rewritten.model, rewritten.statistics, world.model.groups(), DOUBLE_BITS)
    artifact = lowered(world, rewritten, methods, tmp_path / "artifact")
    size = transported(artifact, tmp_path)
    (kl8, _, right8), (kl, same, right) = hits(world, plain), hits(world, artifact)
    print(f"\nint8: {plain.file_bytes:,} bytes, KL {kl8:.4f}, text {right8:.2%}")
    print(f"double: {size}, KL {kl:.4f}, same {same:.1%}, text {right:.2%}")
    assert 2.2 * size.coded_bytes <= plain.file_bytes
    assert right >= right8 - 0.015


def test_weights_stay_coded_in_memory(world: World, tmp_path: Path) -> None:
    """In ONNX Runtime, INT8 plain and double compression coded: what each process grows by, loading included."""
    plain = lowered(world, Rewritten(world.model, world.statistics), {}, tmp_path / "plain", "onnx", "int8")
    rewritten = in_scaled_channels(world.model, world.statistics)
    methods = coarse_int8_methods(rewritten.model, rewritten.statistics, world.model.groups(), DOUBLE_BITS)
    coarse = lowered(world, rewritten, methods, tmp_path / "coarse", "onnx", "int8")
    code_beside(coarse.weights, "small", silent)
    coded = replace(coarse, weights=tuple(path.with_name(path.name + SUFFIX) for path in coarse.weights), coded=True)
    prompt = world.evaluation.tokens[0, :PROMPT].tolist()
    with OpenedArtifact(plain, WINDOW, THREADS) as child:
        whole = child.measure(prompt, DECODE, 1)
    with OpenedArtifact(coarse, WINDOW, THREADS) as child:
        expected = child.logits(prompt)
    with OpenedArtifact(coded, WINDOW, THREADS) as child:
        timing, took = child.measure(prompt, DECODE, 1), child.residence()
        share = grown(timing) / grown(whole)
        print(f"\nplain: {plain.file_bytes:,} bytes, process {grown(whole):,}, {whole}")
        print(f"coded: {coded.file_bytes:,} bytes, process {grown(timing):,}, {share:.3f} of plain; {took}, {timing}")
        speeds = {}
        for times in FLOORS:
            floor = times * timing.decode_tokens_per_s
            child.keep_up(floor)
            speeds[floor] = child.measure(prompt, DECODE, 1).decode_tokens_per_s
            took = child.residence()
            print(
                f"floor {floor:.2f}: {speeds[floor]:.2f} tokens/s, {took.resident_bytes / grown(whole):.3f} of plain, "
                f"{took.plain_parts} parts plain"
            )
        assert np.array_equal(child.logits(prompt), expected)
    assert share <= 0.6
    assert all(speed >= floor for floor, speed in speeds.items())


def grown(timing: Timing) -> int:
    """Return what a model made a process grow by, at its peak."""
    return timing.peak_bytes - timing.interpreter_bytes


@pytest.mark.parametrize("kind", ["int8", "coarse"])
def test_fast_restores_300_mb_a_second(world: World, tmp_path: Path, kind: str) -> None:
    coarse = kind == "coarse"
    rewritten = (
        in_scaled_channels(world.model, world.statistics) if coarse else Rewritten(world.model, world.statistics)
    )
    methods = (
        coarse_int8_methods(rewritten.model, rewritten.statistics, world.model.groups(), DOUBLE_BITS) if coarse else {}
    )
    (model,) = lowered(world, rewritten, methods, tmp_path / "artifact").weights
    sizes = {profile: code_file(model, tmp_path / profile, profile, layout_of(model)) for profile in ("small", "fast")}  # type: ignore[arg-type]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        restore_file(tmp_path / "fast", tmp_path / "restored")
        seconds.append(time.perf_counter() - began)
    speed = sizes["fast"].original_bytes / min(seconds) / 1e6
    more = sizes["fast"].coded_bytes / sizes["small"].coded_bytes - 1
    print(f"\n{kind}: fast {speed:.0f} MB/s, {more:.1%} larger than small; {sizes}")
    assert speed >= 300
