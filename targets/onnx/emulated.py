"""ONNX Runtime on an emulated Arm core: how an artifact may round activations, and its logits in each case."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from exporter.emulate.arm64.core import Core
from exporter.emulate.arm64.installation import Installation
from exporter.emulate.arm64.logits import read_logits
from exporter.formats.format import Float32
from exporter.foundation.cache import replacing, scratch_folder
from exporter.foundation.quantities import from_json
from exporter.targets.artifact import Artifact, share
from exporter.targets.emulated import Run
from exporter.targets.onnx.rounding import (
    DISABLE_KLEIDIAI,
    FLOAT32,
    KLEIDIAI,
    WITHOUT_KLEIDIAI,
    Rounding,
)
from exporter.targets.onnx.session import decoder_settings
from exporter.targets.onnx.settings import CONFIGURATION, GenaiConfig

EMULATED_MAIN = Path(__file__).with_name("emulated_main.py")


class EmulatedOnnx:
    """Decoders with `MatMulNBits` on emulated cores; see `exporter.targets.emulated.Emulated`."""

    title = "ONNX Runtime"
    exact = FLOAT32

    def require(self, installation: Installation, core: Core) -> None:
        """Require that the system is installed."""
        installation.machine(core)

    def rounds(self, core: Core) -> bool:
        """Return whether the core has int8 kernels."""
        return "dotprod" in core.features

    def current(self, artifact: Artifact) -> Rounding:
        """Return the rounding that the graph and the configuration state."""
        levels = {attribute.i for attribute in _attributes(_graph(artifact), "accuracy_level")}
        if levels == {FLOAT32.level}:
            return FLOAT32
        without = decoder_settings(artifact.folder)["session_options"].get(DISABLE_KLEIDIAI) == "1"
        return WITHOUT_KLEIDIAI if without else KLEIDIAI

    def candidates(self, artifact: Artifact, core: Core) -> Mapping[str, Rounding]:
        """Return KleidiAI's kernels, ONNX Runtime's own, and float32 if the codes have fast kernels for it."""
        current = self.current(artifact)
        if not self.rounds(core):
            return {"float32": replace(current, reason="without dotprod the kernels for int8 are not there")}
        found = {"int8 in rows (KleidiAI)": KLEIDIAI, "int8 in blocks": WITHOUT_KLEIDIAI}
        bits = {attribute.i for attribute in _attributes(_graph(artifact), "bits")}
        if bits <= set(FLOAT32.quick_bits) or current == FLOAT32:
            found["float32"] = FLOAT32
        return found

    def configured(self, artifact: Artifact, setting: Rounding, folder: Path) -> Artifact:
        """Write the graph and the configuration with a setting; link the data if the folder is not the artifact's."""
        model, data = artifact.weights
        graph = _graph(artifact)
        for attribute in _attributes(graph, "accuracy_level"):
            attribute.i = setting.level
        given = artifact.folder / CONFIGURATION
        configuration = from_json(GenaiConfig, given.read_bytes(), given).with_session_options(dict(setting.options))
        with replacing(folder / model.name) as partial:
            onnx.save_model(graph, str(partial))
        with replacing(folder / CONFIGURATION) as partial:
            partial.write_text(configuration.to_text(), encoding="utf-8")
        if not (folder / data.name).exists():
            share(data, folder / data.name)
        return Artifact(artifact.target, folder, (folder / model.name, folder / data.name))

    def logits(self, artifact: Artifact, run: Run) -> Float32:
        """Return the logits after each token, float32 [tokens, vocab], computed by `emulated_main.py`."""
        request = {"model": _request(artifact), "tokens": run.tokens, "single": run.single, "threads": run.threads}
        with scratch_folder() as scratch:
            asked, made = scratch / "request.json", scratch / "logits.npy"
            asked.write_text(json.dumps(request), encoding="utf-8")
            run.installation.machine(run.core).python(EMULATED_MAIN, [asked, made], run.timeout_s)
            return read_logits(made, len(run.tokens))


def _request(artifact: Artifact) -> dict[str, object]:
    settings = decoder_settings(artifact.folder)
    return {
        "path": str(artifact.weights[0].absolute()),
        "head_width": settings["head_size"],
        "options": settings["session_options"],
    }


def _graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load_model(str(artifact.weights[0]), load_external_data=False)


def _attributes(model: onnx.ModelProto, name: str) -> list[onnx.AttributeProto]:
    """Return the attributes of that name of all `MatMulNBits` nodes."""
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return [attribute for node in products for attribute in node.attribute if attribute.name == name]


EMULATED = EmulatedOnnx()
