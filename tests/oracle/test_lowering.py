"""The float32 copy of an artifact against its float model: what rounding would hide, it shows."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest

from exporter import pipeline
from exporter.compress.compression import Compression
from exporter.foundation.errors import ExporterError, RequestError
from exporter.foundation.quantities import from_json
from exporter.model import excerpt
from exporter.model.sources import open_model
from exporter.pipeline import plan
from exporter.planning.job import Job
from exporter.planning.resolve import for_context
from exporter.prove import accuracy
from exporter.prove.lowering import Decoded, check_lowering, float_copy
from exporter.report.data import Report
from exporter.targets.artifact import Artifact
from exporter.targets.contract import MOST_LOWERING_KL, load_target, lower
from exporter.targets.gguf.target import Gguf
from exporter.targets.onnx.target import Onnx
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, (2, 48))
TYPES = {"gguf": "Q4_0", "onnx": "int4", "onnx-qdq": "a16w8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lowering")
    tiny_model(folder / "model", layers=3)
    words = "the capital of France is Paris, numbers 12 345 and hello world. " * 400
    (folder / "text.txt").write_text(words)
    return folder


def job(folder: Path, output: Path, target: str) -> Job:
    text = folder / "text.txt"
    return Job(
        str(folder / "model"), "raspberry-pi-5", target, TYPES[target], output=output, calibration=text,
        evaluation=text, context=128, effort="fast",
    )  # fmt: skip


def lowering(source: Path, output: Path, target: str) -> Any:
    pipeline.build(job(source, output, target))
    report = from_json(Report, (output / "report.json").read_bytes(), output)
    (check,) = (one for one in report.checks if one.name == "lowering")
    assert not list(output.rglob(".float-*"))
    return check


@pytest.mark.parametrize("target", TYPES)
def test_a_right_artifact_passes(source: Path, tmp_path: Path, target: str) -> None:
    check = lowering(source, tmp_path / "bundle", target)
    assert check.status == "passed"
    assert 0 <= check.value < 1e-9
    assert check.limit == MOST_LOWERING_KL
    assert "every layer" in check.detail


def test_of_a_large_model_the_first_and_the_last_layer_are_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(excerpt, "WHOLE_PARAMETERS", 1000)
    check = lowering(source, tmp_path / "bundle", "gguf")
    assert check.status == "passed"
    assert "of 2 layers, the first and the last among them," in check.detail


def slower_turns(path: Path) -> None:
    """Turn positions by a base that differs by a hundredth: far less than four bits cost."""
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field("llama.rope.freq_base")
    assert field is not None
    field.parts[field.data[0]][0] *= 1.01
    reader.data.flush()


def other_epsilon(path: Path) -> None:
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field("llama.attention.layer_norm_rms_epsilon")
    assert field is not None
    field.parts[field.data[0]][0] = 1e-3
    reader.data.flush()


@pytest.mark.parametrize("damage", [slower_turns, other_epsilon])
def test_a_fault_of_the_header_is_refused_though_rounding_hides_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    write = Gguf.write

    def damaged(*arguments: Any) -> Artifact:
        artifact = write(*arguments)
        damage(artifact.weights[0])
        return artifact

    monkeypatch.setattr(Gguf, "write", damaged)
    with pytest.raises(ExporterError, match=r"lowering: the artifact is not the model that was planned"):
        pipeline.build(job(source, tmp_path / "bundle", "gguf"))
    assert not (tmp_path / "bundle").exists()


def test_a_fault_of_the_graph_is_refused_though_rounding_hides_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Onnx.write

    def damaged(*arguments: Any) -> Artifact:
        artifact = write(*arguments)
        graph = onnx.load_model(str(artifact.weights[0]), load_external_data=False)
        for node in graph.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 1e-3
        onnx.save_model(graph, str(artifact.weights[0]))
        return artifact

    monkeypatch.setattr(Onnx, "write", damaged)
    with pytest.raises(ExporterError, match=r"lowering: the artifact is not the model that was planned"):
        pipeline.build(job(source, tmp_path / "bundle", "onnx"))


def test_an_artifact_in_float32_is_its_own_copy(source: Path, tmp_path: Path) -> None:
    target = load_target("gguf")
    with open_model(str(source / "model")) as model:
        compressed = Compression(model, target.decide(model, "F32", "rtn"))
        lowered = lower(target, compressed, "F32", tmp_path)
        with float_copy(target, lowered, Decoded(target.read_back(lowered.artifact, model))) as copy:
            assert copy.artifact is lowered.artifact
            check = check_lowering(copy, accuracy.Reference.of(copy.model, TOKENS), 1)
    assert check.status == "passed"


def test_onnx_tables_are_as_long_as_asked_for(source: Path, tmp_path: Path) -> None:
    target = load_target("onnx")
    with open_model(str(source / "model")) as model:
        long = replace(model, decoder=replace(model.decoder, positions=4 << 20))
        bounded = for_context(long, 512, 4 << 20)
        assert bounded.decoder.context_length == 131_072
        assert "131,072 of the model's 4,194,304 positions" in bounded.warnings[-1]
        assert for_context(long, 4 << 20, 4 << 20) is long
        assert for_context(model, 512, 4 << 20) is model
        short = replace(model, decoder=replace(model.decoder, positions=256))
        sizes = {}
        for name, one in (("whole", model), ("short", short)):
            (tmp_path / name).mkdir()
            compressed = Compression(one, target.decide(one, "int8", "rtn"))
            artifact = lower(target, compressed, "int8", tmp_path / name).artifact
            sizes[name] = artifact.file_bytes
            assert abs(target.estimated_file_bytes(one, list(compressed.decisions.values())) / sizes[name] - 1) < 0.2
    # A cosine and a sine for each of half the head's 16 channels.
    assert sizes["whole"] - sizes["short"] == pytest.approx((1024 - 256) * 2 * 8 * 4, abs=8192)


@pytest.mark.parametrize(
    ("target", "type", "method", "sentence"),
    [
        ("gguf", "Q4_K_M", "coarse-int8", "steps can be chosen in symmetric formats of 8 bits only"),
        ("onnx", "int4", "entropy-constrained-int8", "steps can be chosen in symmetric formats of 8 bits only"),
    ],
)
def test_methods_and_types_that_do_not_go_together_are_refused_at_plan(
    tmp_path: Path, target: str, type: str, method: str, sentence: str
) -> None:
    model = tiny_model(tmp_path / "model", tied=False, hidden=256, intermediate=256)
    with pytest.raises(RequestError, match=sentence):
        plan(Job(str(model), "raspberry-pi-5", target, type, method))
