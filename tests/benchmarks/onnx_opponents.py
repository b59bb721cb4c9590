"""What onnxruntime-genai's builder and onnxruntime's own quantisers make of a model."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from exporter.calibrate.windows import Tokens
from exporter.child.process import Child
from exporter.targets.artifact import Artifact

INT8_HEAD = "matmul_mixed_precision=last_matmul:int8"
# The builder's settings, by what they are called here. Its default algorithm with an int8 head shared with the
# embedding is missing: version 0.18 writes a graph that names a tensor which it does not hold, and nothing loads it.
SETTINGS = {
    "default": (),
    "k_quant": ("algo_config=k_quant",),
    "rtn, int8 head": ("algo_config=rtn", INT8_HEAD),
    "k_quant, int8 head": ("algo_config=k_quant", INT8_HEAD),
    "k_quant, int8 head and mixed layers": ("algo_config=k_quant", f"{INT8_HEAD},mixed_layers:int8"),
}
# The builder with a config that it can read.
SHIMMED = "tests.benchmarks.shimmed_builder"
ROOT = Path(__file__).resolve().parents[2]
BLOCK = 32
# HQQ's zero points are float32: at blocks of 64 it takes the bytes that the others take at 32.
HQQ_BLOCK = 64
# Each of GPTQ's 121 inputs costs it a forward pass over all of them.
GPTQ_WINDOWS = 8


def built(
    model: Path, folder: Path, *options: str, precision: str = "int4", builder: str = "onnxruntime_genai.models.builder"
) -> Artifact:
    """Run the builder's command line and check that it heeded the options: it ignores what it does not know.

    Args:
        model: A Hugging Face folder.
        folder: Is made.
        options: The builder's extra options.
        precision: The builder's name of it.
        builder: The module to run: the builder, or `SHIMMED`.
    """
    command = [sys.executable, "-m", builder, "-p", precision, "-e", "cpu"]
    extra = ["--extra_options", *options] if options else []
    made = folder.absolute()
    paths = ["-i", model.absolute(), "-o", made, "-c", made.with_name("cache")]
    subprocess.run([*command, *paths, *extra], check=True, capture_output=True, cwd=ROOT)
    artifact = _artifact(folder)
    if precision == "int4":
        bits = _bits(onnx.load_model(str(folder / "model.onnx"), load_external_data=False))
        assert (bits["/lm_head/"] == 8) == any("last_matmul:int8" in option for option in options), options
        inner = {found for stem, found in bits.items() if stem != "/lm_head/"}
        assert inner == ({4, 8} if any("mixed_layers:int8" in option for option in options) else {4}), options
    return artifact


def _bits(model: onnx.ModelProto) -> dict[str, int]:
    """Return the bits of each matrix by the stem of its node's name."""
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    return {
        node.name.partition("MatMul")[0]: next(found.i for found in node.attribute if found.name == "bits")
        for node in nodes
    }


def _artifact(folder: Path) -> Artifact:
    return Artifact("onnx", folder, (folder / "model.onnx", folder / "model.onnx.data"))


def with_own_quantiser(floats: Path, base: Artifact, folder: Path, algorithm: str, windows: Tokens) -> Artifact:
    """Put the matrices that onnxruntime's GPTQ or HQQ makes into what the builder made: its embedding and head stay.

    By itself either leaves the embedding in float32 (113 MB), which would be no opponent.

    Args:
        floats: The float32 model of the same builder.
        base: The builder's int4 artifact.
        folder: Is made.
        algorithm: `GPTQ` or `HQQ`.
        windows: Calibration text, int64 [windows, length].
    """
    made = folder.with_name(f"{folder.name}-matrices.onnx")
    with Child("onnxruntime's quantiser", 8 << 30) as child:
        child.run(_quantise, 3600, floats, made, algorithm, windows[:GPTQ_WINDOWS])
    donor = onnx.load_model(str(made))
    model = onnx.load_model(str(base.weights[0]))
    given = {node.output[0]: node for node in donor.graph.node if node.op_type == "MatMulNBits"}
    values = {tensor.name: tensor for tensor in donor.graph.initializer}
    replaced = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and node.output[0] in given:
            replacement = given[node.output[0]]
            assert replacement.input[0] == node.input[0]
            names = [f"{algorithm}.{name}" for name in replacement.input[1:]]
            for name, source in zip(names, replacement.input[1:], strict=True):
                model.graph.initializer.add().CopyFrom(values[source])
                model.graph.initializer[-1].name = name
            del node.input[1:], node.attribute[:]
            node.input.extend(names)
            node.attribute.extend(replacement.attribute)
            replaced += 1
    assert replaced == sum(node.op_type == "MatMulNBits" for node in model.graph.node) - 1, "all but the head"
    made.unlink()
    return _saved(model, base, folder)


def _quantise(floats: Path, made: Path, algorithm: str, windows: Tokens) -> None:
    """Run onnxruntime's quantiser on the layers; the head is cut off, which is no part of them and costs most."""
    model = onnx.load_model(str(floats))
    (head,) = (node for node in model.graph.node if node.name == "/lm_head/MatMul")
    hidden = head.input[0]
    kept = [node for node in model.graph.node if "lm_head" not in node.name]
    del model.graph.node[:], model.graph.output[:]
    model.graph.node.extend(kept)
    model.graph.output.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, None))
    if algorithm == "GPTQ":
        config = GPTQWeightOnlyQuantConfig(_Windows(model, windows, _head_width(floats.parent)))
    else:
        config = HQQWeightOnlyQuantConfig(block_size=HQQ_BLOCK)
    block = BLOCK if algorithm == "GPTQ" else HQQ_BLOCK
    # 4 is what the builder asks for on processors: activations in int8. HQQ does not take it.
    quantiser = MatMulNBitsQuantizer(model, block_size=block, is_symmetric=False, accuracy_level=4, algo_config=config)
    quantiser.process()
    onnx.save_model(quantiser.model.model, str(made))


def _head_width(folder: Path) -> int:
    settings = json.loads((folder / "genai_config.json").read_text("utf-8"))
    return int(settings["model"]["decoder"]["head_size"])


class _Windows(CalibrationDataReader):
    """Windows of tokens as the float model's inputs, without keys and values of earlier tokens."""

    def __init__(self, model: onnx.ModelProto, windows: Tokens, head_width: int) -> None:
        dims = {given.name: given.type.tensor_type.shape.dim for given in model.graph.input}
        self._inputs = list(dims)
        self._heads = {name: dims[name][1].dim_value for name in dims if name.startswith("past_key_values.")}
        self._windows = windows
        self._head_width = head_width

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for tokens in self._windows:
            yield {name: self._value(name, tokens) for name in self._inputs}

    def _value(self, name: str, tokens: np.ndarray) -> np.ndarray:
        if name == "input_ids":
            return tokens[None]
        if name == "attention_mask":
            return np.ones_like(tokens)[None]
        if name == "position_ids":
            return np.arange(len(tokens))[None]
        return np.zeros((1, self._heads[name], 0, self._head_width), np.float32)

    def get_next(self) -> None:
        raise NotImplementedError("the quantiser iterates")


def with_float16_scales(base: Artifact, folder: Path) -> Artifact:
    """Store the scales of an artifact in float16 behind a `Cast` that onnxruntime folds when it loads the model."""
    model = onnx.load_model(str(base.weights[0]))
    scales = {node.input[2] for node in model.graph.node if node.op_type == "MatMulNBits"}
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            values, name = numpy_helper.to_array(tensor), tensor.name
            assert values.dtype == np.float32
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
            casts.append(helper.make_node("Cast", [f"{name}.float16"], [name], f"{name}.Cast", to=TensorProto.FLOAT))
    assert len(casts) == len(scales) > 0
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _saved(model, base, folder)


def _saved(model: onnx.ModelProto, base: Artifact, folder: Path) -> Artifact:
    """Write a model beside copies of another's small files, without the initialisers that nothing uses."""
    folder.mkdir()
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for path in base.folder.iterdir():
        if path not in base.weights:
            (folder / path.name).write_bytes(path.read_bytes())
    onnx.save_model(
        model, str(folder / "model.onnx"), save_as_external_data=True, location="model.onnx.data", size_threshold=1024
    )
    return _artifact(folder)
