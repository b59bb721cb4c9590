"""How activations are rounded is decided by the device, stated, and carried by the artifact's own configuration."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.compress.compression import Compression
from exporter.device.profile import device_names, load_device
from exporter.model.sources import open_model
from exporter.targets.contract import load_target, lower
from exporter.targets.kernel_speeds import speed_files
from exporter.targets.onnx.matmulnbits import matmulnbits_formats
from exporter.targets.onnx.rounding import DISABLE_KLEIDIAI, rounding_on
from exporter.targets.onnx.target import ALPHABET
from exporter.targets.opened import OpenedArtifact
from tests.models import tiny_model

WITHOUT_DOTPROD = {"core-ultra-200v", "raspberry-pi-4"}
MORE_WITHOUT_DOTPROD = {
    "core-i7-1185g7", "core-ultra-155h", "framework-13-ryzen-ai-5", "framework-13-ryzen-ai-9", "framework-desktop",
    "gmktec-evo-x1", "gmktec-g3-plus", "raspberry-pi-400",
}  # fmt: skip


def test_the_alphabet_is_quick_and_on_a_device_without_int8_kernels_of_four_bits_alone(tmp_path: Path) -> None:
    for file in speed_files("exporter.targets.onnx"):
        assert set(file.speeds) == {name for name in matmulnbits_formats() if not name.endswith("-f32")}
        assert all(min(file.speeds[name].decode, file.speeds[name].prefill) > 0.5 for name in ALPHABET)
    target = load_target("onnx")
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        bits = {
            name: {
                format.name[:4]
                for storage in target.on(load_device(name)).storages(model)
                for format in storage.formats
            }
            for name in WITHOUT_DOTPROD
        }
    assert bits == {"core-ultra-200v": {"int2", "int4", "int8"}, "raspberry-pi-4": {"int4"}}


@pytest.mark.parametrize("device", ["core-ultra-200v", "raspberry-pi-5", "raspberry-pi-4"])
def test_the_artifact_carries_what_was_decided_for_the_device(tmp_path: Path, device: str) -> None:
    target = load_target("onnx").on(load_device(device))
    coarse = device not in WITHOUT_DOTPROD
    with open_model(str(tiny_model(tmp_path / "model"))) as model:
        decisions = target.decide(model, "int4", "rtn")
        (tmp_path / "artifact").mkdir()
        artifact = lower(target, Compression(model, decisions), "int4", tmp_path / "artifact").artifact
    said = "activations in float32" if device == "raspberry-pi-4" else "accuracy level 4"
    assert all(said in decision.reason for decision in decisions)
    assert all(("without KleidiAI" in decision.reason) == coarse for decision in decisions)
    settings = json.loads((artifact.folder / "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    assert settings["session_options"].get(DISABLE_KLEIDIAI) == ("1" if coarse else None)
    graph = onnx.load_model(str(artifact.weights[0]), load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    levels = [a.i for node in products for a in node.attribute if a.name == "accuracy_level"]
    assert levels == [4] * len(products)
    with OpenedArtifact(artifact, 64, 1) as child:
        assert np.isfinite(child.logits([5, 6, 7])).all()
        assert child.generate([5, 6, 7], 4)


def test_every_device_has_its_rounding() -> None:
    found = {name: dict(rounding_on(load_device(name)).options) for name in device_names()}
    assert {name for name, options in found.items() if not options} == WITHOUT_DOTPROD | MORE_WITHOUT_DOTPROD
