"""The pipeline for neural processors against the whole graph, and its compiled form on Qualcomm's emulator."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai
import pytest

from exporter.calibrate.statistics import collect
from exporter.calibrate.windows import Windows
from exporter.compress.compression import Compression
from exporter.device.profile import load_device
from exporter.foundation.errors import MissingDependencyError
from exporter.model.sources import open_model
from exporter.prove.emulation import Emulation
from exporter.prove.npu import ACCURACY, NAMES, PLACED, TOKENS, prove_on_npu
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.npu import npu_target, processor_of
from exporter.targets.onnx_qdq.npu import qualcomm
from exporter.targets.onnx_qdq.npu.emulator import generated
from exporter.targets.opened import OpenedArtifact
from tests.models import FAMILIES, tiny_model

DEVICE = load_device("galaxy-s24-ultra")
TEXT = np.random.default_rng(0).integers(2, 300, (2, 128))
emulated = pytest.mark.skipif(find_spec(qualcomm.MODULE) is None, reason=f"needs {qualcomm.INSTALL}")


def made(folder: Path, family: str = "llama", type: str = "a16w8", device: str = "galaxy-s24-ultra") -> Artifact:
    """Return an artifact in `artifact`, of the model in `model`."""
    tiny_model(folder / "model", family)
    (folder / "artifact").mkdir()
    with open_model(str(folder / "model")) as model:
        target = load_target("onnx-qdq").on(load_device(device))
        statistics = collect(model, Windows.of(TEXT[:, :48], "file", 0), 0, lambda done, total: None)
        changed = target.rewritten(model, statistics, [])
        decisions = target.decide(model, type, "rtn")
        compression = Compression(changed.model, decisions, changed.statistics, source=model)
        return lower(target, compression, type, folder / "artifact").artifact


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_EXPORTER_CACHE", str(tmp_path / "cache"))


def proved(folder: Path, artifact: Artifact) -> Emulation:
    with open_model(str(folder / "model")) as model:
        return prove_on_npu(artifact, model, DEVICE, TEXT)


def statuses(emulation: Emulation) -> dict[str, str]:
    return {check.name: check.status for check in emulation.checks}


def on_cpu(folder: Path) -> None:
    """Let the stages of a pipeline run on the CPU."""
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text())
    for entry in settings["model"]["decoder"]["pipeline"]:
        for stage in entry.values():
            stage["session_options"]["provider_options"] = []
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lfm2"])
def test_the_pipeline_generates_what_the_whole_graph_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    artifact = made(tmp_path, family)
    on_cpu(artifact.folder / "npu")
    text = TEXT.reshape(-1).tolist()
    for length in (5, 63, 64, 65, 130):
        found = []
        for folder in (artifact.folder, artifact.folder / "npu"):
            monkeypatch.chdir(folder)
            found.append(generated(text[:length], 4, emulated=False))
        # Stages round activations as the graph does; what the runtime rounds beyond is off for the whole graph only.
        with OpenedArtifact(artifact, 256, 1, exact=True) as opened:
            last = opened.logits(text[:length])[-1]
        assert last[found[0][0]] - last[found[1][0]] < 0.05


def test_a_family_with_other_states_has_no_pipeline(tmp_path: Path) -> None:
    artifact = made(tmp_path, "lfm2")
    assert not (artifact.folder / "npu").exists()
    emulation = proved(tmp_path, artifact)
    assert statuses(emulation) == dict.fromkeys(NAMES, "not run")
    assert "states of convolutions" in emulation.checks[0].detail


@pytest.mark.parametrize(("device", "said"), [("galaxy-s20-plus", "v66"), ("galaxy-a52s", "v68")])
def test_processors_without_float16_are_refused_by_name(tmp_path: Path, device: str, said: str) -> None:
    artifact = made(tmp_path, device=device)
    assert [path.name for path in artifact.weights] == ["model.onnx", "model.onnx.data"]
    assert not (artifact.folder / "npu").exists()
    with open_model(str(tmp_path / "model")) as model:
        emulation = prove_on_npu(artifact, model, load_device(device), TEXT)
    assert statuses(emulation) == dict.fromkeys(NAMES, "not run")
    assert f"Hexagon {said}, which does not compute in float16" in emulation.checks[0].detail


def test_other_devices_have_no_pipeline(tmp_path: Path) -> None:
    artifact = made(tmp_path, device="raspberry-pi-5")
    assert not (artifact.folder / "npu").exists()
    with open_model(str(tmp_path / "model")) as model:
        assert prove_on_npu(artifact, model, load_device("raspberry-pi-5"), TEXT) == Emulation()


def test_without_the_extra_the_checks_are_not_run_and_the_bundle_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = made(tmp_path)

    def missing() -> None:
        raise MissingDependencyError("it is not installed", next_step=qualcomm.INSTALL)

    monkeypatch.setattr(qualcomm, "require_installed", missing)
    emulation = proved(tmp_path, artifact)
    assert statuses(emulation) == dict.fromkeys(NAMES, "not run")
    assert all(qualcomm.INSTALL in check.detail for check in emulation.checks)
    onnxruntime_genai.Model(str(artifact.folder))


@emulated
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_all_products_are_on_the_emulated_processor(tmp_path: Path, family: str) -> None:
    artifact = made(tmp_path, family)
    emulation = proved(tmp_path, artifact)
    assert statuses(emulation) == {PLACED: "passed", ACCURACY: "passed", TOKENS: "passed"}
    placed = emulation.checks[0]
    assert placed.value == placed.limit == 14
    assert "on the CPU: 2 GroupQueryAttention" in placed.detail
    assert emulation.quantities["npu.added_kl"].value < 1e-4
    assert emulation.quantities["npu.kl"].value < 1.15 * emulation.quantities["npu.same_graph_kl"].value + 1e-4


@emulated
def test_the_same_job_gives_the_same_binaries(tmp_path: Path) -> None:
    npu, processor = npu_target("onnx-qdq"), processor_of(DEVICE)
    assert npu is not None and processor is not None
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        compiled = npu.compile(made(tmp_path / name), processor)
        found.append({path.name: path.read_bytes() for path in compiled.files})
    assert found[0] == found[1]
    assert sorted(found[0]) == [
        "context_ctx.onnx", "context_ctx_qnn.bin", "iterator_ctx.onnx", "iterator_ctx_qnn.bin",
    ]  # fmt: skip


def without_zero_points(graph: onnx.GraphProto, folder: Path) -> None:
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.name.endswith("/weight"):
            del node.input[2]


def with_scales_off(graph: onnx.GraphProto, folder: Path) -> None:
    """Double the weights of the second layer's down projection."""
    (node,) = (node for node in graph.node if node.name.endswith("layers.1/mlp/down_proj/weight"))
    (scales,) = (tensor for tensor in graph.initializer if tensor.name == node.input[1])
    twice = 2 * onnx.numpy_helper.to_array(scales, str(folder))
    graph.initializer.append(onnx.numpy_helper.from_array(twice, f"{scales.name}/twice"))
    node.input[1] = f"{scales.name}/twice"


@emulated
@pytest.mark.parametrize("fault", [None, without_zero_points, with_scales_off])
def test_a_planted_fault_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[onnx.GraphProto, Path], None] | None
) -> None:
    monkeypatch.setattr("exporter.prove.npu._generated", lambda proving, tokens: Emulation())
    artifact = made(tmp_path, type="a16w4")
    for stage in ("context", "iterator"):
        path = artifact.folder / "npu" / f"{stage}.onnx"
        model = onnx.load_model(path, load_external_data=False)
        if fault is not None:
            fault(model.graph, path.parent)
        onnx.save_model(model, path)
    emulation = proved(tmp_path, artifact)
    expected = "passed" if fault is None else "failed"
    assert statuses(emulation) == {PLACED: "passed", ACCURACY: expected}
