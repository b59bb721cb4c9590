"""The second runtime reads artifacts by code of its own, agrees with the float model, and notices what is wrong."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.compress.compression import Compression
from exporter.foundation.errors import MissingDependencyError, RequestError
from exporter.foundation.quantities import Check
from exporter.model.gguf_reader import open_gguf
from exporter.model.model import Model
from exporter.model.sources import open_model
from exporter.pipeline import build, plan
from exporter.planning.job import Job
from exporter.prove.accuracy import Reference, dequantised
from exporter.prove.judge import judge
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.judge import judge_of
from exporter.targets.opened import OpenedArtifact
from tests.connect.quiet import quietly
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 300, (2, 64))
INSTALLED = all(importlib.util.find_spec(name) for name in ("openvino", "openvino_genai"))
needs_openvino = pytest.mark.skipif(not INSTALLED, reason="needs the extra openvino")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Yield a tied model whose matrices are a multiple of 256 wide."""
    folder = tiny_model(tmp_path_factory.mktemp("model"), hidden=256, intermediate=256, layers=1)
    with open_model(str(folder)) as opened:
        yield opened


def written(model: Model, target: str, type: str, folder: Path) -> Artifact:
    made, place = load_target(target), folder / "bundle" / "model"
    place.mkdir(parents=True)
    return lower(made, Compression(model, made.decide(model, type, "rtn")), type, place).artifact


def judged(artifact: Artifact, model: Model) -> Check:
    read = load_target(artifact.target).read_back(artifact, model)
    own = Reference.of(dequantised(model, read), TOKENS)
    return checked(artifact, own)


def checked(artifact: Artifact, own: Reference) -> Check:
    before = sorted(artifact.folder.parent.rglob("*"))
    with OpenedArtifact(artifact, 64, 1) as opened:
        check = judge(artifact, own, opened.logits, 1)
    assert sorted(artifact.folder.parent.rglob("*")) == before
    assert check.name == "judge.openvino"
    return check


@needs_openvino
@pytest.mark.parametrize(
    ("target", "type"),
    [
        ("onnx", "int4"), ("onnx", "int2-b32-asymmetric"), ("onnx", "int8-b64-f32"), ("gguf", "Q4_0"),
        ("gguf", "Q8_0"), ("gguf", "Q6_K"),
    ],
)  # fmt: skip
def test_it_agrees_with_the_float_model(model: Model, tmp_path: Path, target: str, type: str) -> None:
    check = judged(written(model, target, type, tmp_path), model)
    assert check.status == "passed", check.detail
    assert check.value is not None
    assert check.value < 1e-9 or type in ("Q4_0", "Q6_K")
    assert "62 tokens" in check.detail


@needs_openvino
def test_an_embedding_of_its_own(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", tied=False, layers=1)
    with open_model(str(folder)) as untied:
        assert judged(written(untied, "onnx", "int4", tmp_path), untied).status == "passed"


@needs_openvino
@pytest.mark.parametrize(("target", "type", "file"), [("onnx", "int4", "model.onnx.data"), ("gguf", "Q8_0", None)])
def test_a_flipped_code_fails(model: Model, tmp_path: Path, target: str, type: str, file: str | None) -> None:
    artifact = written(model, target, type, tmp_path)
    read = load_target(target).read_back(artifact, model)
    own = Reference.of(dequantised(model, read), TOKENS)
    path = artifact.folder / file if file else artifact.weights[0]
    data = bytearray(path.read_bytes())
    # A code of the last matrix: the highest bit of one of its values.
    at = changed_place(artifact, model)
    data[at] ^= 0x80
    path.write_bytes(bytes(data))
    check = checked(artifact, own)
    assert check.status == "failed", check.detail
    assert check.value is not None
    assert check.value > 1e-6


def changed_place(artifact: Artifact, model: Model) -> int:
    """Return the offset of a byte of codes in the file of the weights."""
    if artifact.target == "onnx":
        graph = onnx.load_model(str(artifact.weights[0]), load_external_data=False).graph
        (tensor,) = (one for one in graph.initializer if "down_proj" in one.name and one.name.endswith(".codes"))
        return int({entry.key: entry.value for entry in tensor.external_data}["offset"])
    (found,) = (one for one in open_gguf(artifact.weights[0]).tensors if one.name == "blk.0.ffn_down.weight")
    # Behind the float16 scale of the first block.
    return int(found.data_offset) + 2


@needs_openvino
@pytest.mark.parametrize("type", ["Q4_K_M", "Q5_0"])
def test_types_that_it_does_not_keep_are_named(model: Model, tmp_path: Path, type: str) -> None:
    check = judged(written(model, "gguf", type, tmp_path), model)
    assert check.status == "not run"
    assert "refuses or re-rounds types of this GGUF file; got Q" in check.detail


@needs_openvino
def test_what_it_cannot_read_is_told(model: Model, tmp_path: Path) -> None:
    artifact = written(model, "onnx", "int4", tmp_path)
    own = Reference.of(model, TOKENS)
    with OpenedArtifact(artifact, 64, 1) as opened:
        (artifact.folder / "model.onnx").write_bytes(b"no graph")
        check = judge(artifact, own, opened.logits, 1)
    assert check.status == "not run"


@needs_openvino
def test_codes_are_looked_up_as_openvino_wants_them(model: Model, tmp_path: Path) -> None:
    """With scales in float32 OpenVINO reads the graph as it is: codes are constants, of a tied table too."""
    artifact = written(model, "onnx", "int4-b32-f32", tmp_path)
    program = "import sys; from exporter.targets.openvino import openvino; openvino().Core().read_model(sys.argv[1])"
    quietly(tmp_path, sys.executable, "-c", program, str(artifact.weights[0]))


@needs_openvino
def test_a_bundle_holds_the_check(model: Model, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the capital of France is Paris, numbers 12 345 and hello world. " * 400)
    job = Job(
        str(model.folder), "core-ultra-200v", "onnx", "int4", method="rtn", effort="fast", calibration=text,
        evaluation=text, window=64, context=64, evaluation_windows=4, output=tmp_path / "bundle", judge=True,
    )  # fmt: skip
    bundle = build(job)
    (found,) = (one for one in bundle.measurements.checks if one.name == "judge.openvino")
    assert found.status == "passed", found.detail
    (told,) = (one for one in bundle.report.device_checks if one.name == "judge.openvino")
    # The content digest covers how the check ended; its value may differ from run to run.
    assert (told.status, told.limit, told.value) == ("passed", 1e-6, None)
    with pytest.raises(RequestError, match="no second runtime reads artifacts of the target onnx-qdq"):
        plan(replace(job, target="onnx-qdq", type=None, method=None))


@needs_openvino
def test_it_sends_no_telemetry(tmp_path: Path) -> None:
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [given], [made])
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "relu.onnx"
    )
    # Of its tools, this one reports.
    converts = "api.convert_model('relu.onnx')"
    quietly(
        tmp_path, sys.executable, "-c", f"from exporter.targets.openvino import openvino; api = openvino(); {converts}"
    )
    with pytest.raises(AssertionError):
        quietly(tmp_path, sys.executable, "-c", f"import openvino as api; {converts}")


def test_without_the_extra_it_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.targets.judge.find_spec", lambda module: None)
    with pytest.raises(MissingDependencyError, match=r"OpenVINO is not installed; .*edge-exporter\[openvino\]"):
        judge_of("gguf")


def test_a_target_without_a_judge_is_refused() -> None:
    with pytest.raises(RequestError, match="no second runtime reads artifacts of the target onnx-qdq; expected gguf"):
        judge_of("onnx-qdq")
