"""Runs a decoder graph in OpenVINO, which reads ONNX by an importer of its own."""

from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from exporter.targets.artifact import Artifact, share
from exporter.targets.contract import MOST_LOWERING_KL
from exporter.targets.onnx.session import decoder_settings
from exporter.targets.onnx.settings import DATA_FILE, MODEL_FILE
from exporter.targets.openvino import OpenVino

LOOKUP = "GatherBlockQuantized"


class OnnxInOpenVino(OpenVino):
    """A decoder folder; see `exporter.targets.judge.Judge`."""

    modules = ("openvino",)

    def __init__(self, artifact: Artifact, folder: Path, threads: int) -> None:
        # Before the data has a second link, which onnx would refuse to read.
        onnx.save_model(with_constant_tables(artifact.folder), str(folder / MODEL_FILE))
        # OpenVINO follows no symbolic link out of the graph's folder.
        share(artifact.folder / DATA_FILE, folder / DATA_FILE)
        super().__init__(folder / MODEL_FILE, threads, int(decoder_settings(artifact.folder)["head_size"]))

    def most_kl(self) -> float:
        """Return the limit of float32 sums in another order, for OpenVINO keeps codes and scales."""
        return MOST_LOWERING_KL


def with_constant_tables(folder: Path) -> onnx.ModelProto:
    """Return the graph with the scales of looked-up tables widened to float32, where a `Cast` of the graph would do it.

    ONNX Runtime does the same when it loads the graph. OpenVINO's importer wants a constant in this place.
    """
    model: onnx.ModelProto = onnx.load_model(str(folder / MODEL_FILE), load_external_data=False)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.input[0] in held}
    for scales in {node.input[2] for node in graph.node if node.op_type == LOOKUP} & casts.keys():
        cast = casts[scales]
        assert held[cast.input[0]].data_type == TensorProto.FLOAT16
        halves = numpy_helper.to_array(held[cast.input[0]], str(folder))
        graph.initializer.append(numpy_helper.from_array(halves.astype("f4"), scales))
        graph.node.remove(cast)
    return model


JUDGE = OnnxInOpenVino
