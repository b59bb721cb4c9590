"""Writes `model/npu/`, a folder that onnxruntime-genai loads by itself: stages, settings and tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from exporter.device.neural import NeuralProcessor
from exporter.foundation.errors import RequestError
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.targets.onnx.companions import write_text_files
from exporter.targets.onnx.settings import CONFIGURATION, MODEL_FILE
from exporter.targets.onnx.supported import context_length
from exporter.targets.onnx_qdq.npu import FOLDER
from exporter.targets.onnx_qdq.npu.configuration import pipeline_settings, to_text
from exporter.targets.onnx_qdq.npu.padding import padding_token
from exporter.targets.onnx_qdq.npu.stages import cache_length, cut, graph_file

# Without float16, for norms and the residual stream; a graph that is quantised as a whole would compile for it.
WITHOUT_FLOAT16 = ("v66", "v68")


def hindrance(processor: NeuralProcessor, model: Model) -> str | None:
    """Return why a model gets no pipeline for a processor; None if it gets one."""
    if processor.architecture in WITHOUT_FLOAT16:
        return (
            f"the {processor.soc} has Hexagon {processor.architecture}, which does not compute in float16 what the "
            "pipeline leaves unquantised, the norms and the residual stream; v69 and later do"
        )
    if processor.soc_number is None:
        return f"the device's profile has no soc_numbers for the {processor.soc}, and the compiler needs one"
    if any(kernel is not None for kernel in model.decoder.convolutions):
        return "the pipeline has no place for the states of convolutions"
    return None


def write_pipeline(model: Model, folder: Path, processor: NeuralProcessor) -> None:
    """Write the pipeline of an artifact into its folder `npu`, which holds the artifact's data already.

    Args:
        model: The model.
        folder: The artifact's folder.
        processor: The processor.

    Raises:
        RequestError: the graph has a part for which the pipeline has no place.
    """
    number = processor.soc_number
    if number is None:
        raise RequestError("the profile names no number of the SoC", where=processor.soc)
    place = folder / FOLDER
    length = cache_length(context_length(model))
    graph: ModelProto = onnx.load_model(str(folder / MODEL_FILE), load_external_data=False)
    for stage, made in cut(graph, length).items():
        onnx.save_model(made, str(place / graph_file(stage)))
    tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
    padding = padding_token(tokenizer, model.decoder.vocab)
    settings = json.loads((folder / CONFIGURATION).read_text(encoding="utf-8"))
    text = to_text(pipeline_settings(settings, length, padding.token, number))
    (place / CONFIGURATION).write_text(text, encoding="utf-8")
    write_text_files(replace(tokenizer, definition=padding.definition), length, place)
