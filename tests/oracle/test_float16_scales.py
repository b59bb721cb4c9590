"""Float16 scales cost the runtime nothing: ONNX Runtime folds their `Cast` away when it loads."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from exporter.compress.compression import Compression, compress
from exporter.foundation.errors import RequestError
from exporter.model.sources import open_model
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

TOKENS = np.random.default_rng(0).integers(2, 200, 48).tolist()
QUANTISED = ("MatMulNBits", "GatherBlockQuantized")


def lowered(folder: Path, type: str, tied: bool) -> Artifact:
    target = load_target("onnx")
    (folder / "artifact").mkdir()
    with open_model(str(tiny_model(folder / "model", tied=tied))) as model:
        return lower(target, Compression(model, target.decide(model, type, "rtn")), type, folder / "artifact").artifact


def with_float32_scales(artifact: Artifact, folder: Path) -> Artifact:
    """Write the same model with each `Cast` of scales replaced by its result."""
    shutil.copytree(artifact.folder, folder)
    model = onnx.load_model(str(artifact.weights[0]))
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in held]
    for cast in casts:
        half = held[cast.input[0]]
        assert half.data_type == onnx.TensorProto.FLOAT16
        model.graph.initializer.append(
            numpy_helper.from_array(numpy_helper.to_array(half).astype("f4"), cast.output[0])
        )
        model.graph.initializer.remove(half)
        model.graph.node.remove(cast)
    assert casts
    (folder / "model.onnx.data").unlink()
    onnx.save_model(model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    return Artifact("onnx", folder, (folder / "model.onnx", folder / "model.onnx.data"))


def optimised(artifact: Artifact, path: Path) -> onnx.ModelProto:
    """Return the graph as ONNX Runtime runs it, at the level that it optimises to by default."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(artifact.weights[0]), options, providers=["CPUExecutionProvider"])
    return onnx.load_model(str(path), load_external_data=False)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("type", ["int4", "int8", "int4-b16-asymmetric"])
def test_the_cast_is_folded_and_the_logits_are_those_of_float32_scales(tmp_path: Path, type: str, tied: bool) -> None:
    artifact = lowered(tmp_path, type, tied)
    graph = optimised(artifact, tmp_path / "optimised.onnx").graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    scales = {node.name: node.input[2] for node in graph.node if node.op_type in QUANTISED}
    assert len(scales) == 2 * 5 + 2
    assert all(held[name].data_type == onnx.TensorProto.FLOAT for name in scales.values())
    assert not [node.name for node in graph.node if node.op_type == "Cast" and node.input[0] in held]
    # A tied embedding and head use one constant.
    assert len(set(scales.values())) == len(scales) - tied

    plain = with_float32_scales(artifact, tmp_path / "plain")
    logits, greedy = {}, {}
    for kind in (artifact, plain):
        with OpenedArtifact(kind, 128, 1) as child:
            logits[kind.folder.name] = child.logits(TOKENS)
            greedy[kind.folder.name] = child.generate(TOKENS[:8], 16)
    np.testing.assert_array_equal(logits["artifact"], logits["plain"])
    assert greedy["artifact"] == greedy["plain"]


def test_without_folding_the_cast_would_stay(tmp_path: Path) -> None:
    artifact = lowered(tmp_path, "int4", True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "plain.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(str(artifact.weights[0]), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load_model(str(tmp_path / "plain.onnx"), load_external_data=False).graph.node
    assert len([node for node in nodes if node.op_type == "Cast" and node.input[0].endswith(".scales")]) == 2 * 5 + 1


@pytest.mark.parametrize(
    ("target", "type", "holds"), [("onnx", "int4", "int4-b32-f32"), ("onnx", "int8", "F32"), ("gguf", "Q8_0", "F32")]
)
def test_weights_too_small_for_float16_scales_are_not_lost_silently(
    tmp_path: Path, target: str, type: str, holds: str
) -> None:
    folder, name = tiny_model(tmp_path / "model"), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name] *= 1e-9
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    made = load_target(target)
    with open_model(str(folder)) as model:
        refusal = f"{name}: (int4-b32|int8-b32|Q8_0) makes every weight zero; .* choose a type that holds float32"
        with pytest.raises(RequestError, match=refusal):
            list(compress(Compression(model, made.decide(model, type, "rtn"))))
        matrices = compress(Compression(model, made.decide(model, holds, "rtn")))
        (planned,) = (matrix.encoded.planned for matrix in matrices if matrix.name == name)
        np.testing.assert_allclose(planned, model.read(name), atol=1e-10)
