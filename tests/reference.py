"""The reference model: the embedded 135M model with its coarse grid blurred, so that few bits cost what they cost.

The embedded model comes in Q4_1 with a Q8_0 embedding; any 4-bit format looks nearly lossless on weights that lie on a
4-bit grid. Uniform noise of one step of each weight's own block, from half a step below to half a step above, spreads
the weights over the cells that they had been rounded from. The blurred model is the original of every measurement.
"""

import shutil
from importlib import import_module
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from exporter.model.gguf_names import gguf_names, interleaved_rows
from exporter.model.gguf_reader import open_gguf
from exporter.model.sources import open_model

EVALUATION_CHARACTERS = 160_000


def reference_model(folder: Path, seed: int = 0) -> Path:
    """Write the reference model as a Hugging Face folder of float32 weights."""
    with open_model("demo") as model:
        assert model.single_file is not None
        shutil.copytree(model.folder, folder)
        shape = model.decoder
        held = {tensor.name: tensor for tensor in open_gguf(model.single_file).tensors}
        names = gguf_names(shape)
        chance = torch.Generator().manual_seed(seed)
        tensors = {name: torch.from_numpy(model.read(name)) for name in shape.vectors()}
        for group in model.groups():
            steps = _steps(held[names[group.name]])
            if group.role in ("q", "k"):
                order = interleaved_rows(group.rows, shape.heads if group.role == "q" else shape.kv_heads)
                steps[order] = steps.copy()
            noise = torch.rand(group.rows, group.columns, generator=chance) - 0.5
            blurred = torch.from_numpy(steps).repeat_interleave(32, dim=1) * noise
            tensors[group.name] = blurred + torch.from_numpy(model.read(group.name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _steps(tensor: gguf.ReaderTensor) -> np.ndarray:
    """Return the step of each block of 32 columns, which is the float16 that it begins with, [rows, columns / 32]."""
    block = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
    blocks = np.ascontiguousarray(tensor.data).reshape(tensor.data.shape[0], -1, block)
    return np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)


def plain_texts(folder: Path) -> tuple[Path, Path]:
    """Write English prose that comes with Python into a folder: a text to calibrate on and another to measure on."""
    whole = _prose()
    half = len(whole) // 2
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    calibration.write_text(whole[:half], encoding="utf-8")
    evaluation.write_text(whole[half : half + EVALUATION_CHARACTERS], encoding="utf-8")
    return calibration, evaluation


def unseen_text(folder: Path) -> Path:
    """Write the end of that prose into a folder; no setting of the exporter was chosen by what it loses there."""
    whole = _prose()
    path = folder / "unseen.txt"
    path.write_text(whole[len(whole) // 2 + EVALUATION_CHARACTERS :], encoding="utf-8")
    return path


def _prose() -> str:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))
