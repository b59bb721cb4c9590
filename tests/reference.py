"""The reference models: those of the packages, their coarse grids blurred, so that few bits cost what they cost.

    .venv/bin/python -m tests.reference FOLDER [--source demo-gemma] [--seed N]

The packages hold quantised files: SmolLM2 135M in Q4_1 with a Q8_0 embedding, and Gemma 3 270M in the mix Q4_K_M. Any
format of as many bits looks nearly lossless on weights that lie on such a grid. Uniform noise of one step of each
weight's own block, from half a step below to half a step above, spreads the weights over the cells that they had been
rounded from; each matrix takes the steps of the type that it is stored in. A blurred model is the original of every
measurement.
"""

import argparse
import shutil
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

from exporter.model.gguf_names import gguf_names, in_source_order, row_order
from exporter.model.gguf_reader import open_gguf
from exporter.model.licences import licence_files
from exporter.model.sources import open_model
from tests.grid_steps import grid_steps

EVALUATION_CHARACTERS = 160_000


def reference_model(folder: Path, seed: int = 0, source: str = "demo") -> Path:
    """Write a reference model as a Hugging Face folder of float32 weights, with the terms that its source is under.

    Args:
        folder: Is made.
        seed: Of the noise.
        source: `demo` or `demo-gemma`, or a quantised GGUF file whose types are among `grid_steps.STEPS`.
    """
    with open_model(source) as model:
        assert model.single_file is not None
        shutil.copytree(model.folder, folder)
        for terms in model.licences:
            shutil.copyfile(terms, folder / f"LICENSE-{terms.name}")
        assert len(licence_files(folder)) == len(model.licences)
        held = {tensor.name: tensor for tensor in open_gguf(model.single_file).tensors}
        names = gguf_names(model.decoder)
        chance = torch.Generator().manual_seed(seed)
        tensors = {name: torch.from_numpy(model.read(name)) for name in model.decoder.vectors()}
        for group in model.groups():
            stored = held[names[group.name]]
            steps = in_source_order(grid_steps(stored.data, stored.tensor_type), row_order(model.decoder, group))
            noise = torch.rand(group.rows, group.columns, generator=chance) - 0.5
            tensors[group.name] = torch.from_numpy(steps) * noise + torch.from_numpy(model.read(group.name))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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


def main() -> None:
    """Write a reference model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made")
    parser.add_argument("--source", default="demo", help="demo, demo-gemma, or a quantised GGUF file")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    asked = parser.parse_args()
    print(reference_model(asked.folder, asked.seed, asked.source))


if __name__ == "__main__":
    main()
