"""Model folders that are changed in one way, and their float32 artifacts held against transformers."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter.compress.compression import Compression
from exporter.model.sources import open_model
from exporter.prove.accuracy import divergence
from exporter.targets.contract import load_target, lower
from exporter.targets.opened import OpenedArtifact

TOKENS = np.random.default_rng(0).integers(2, 300, 120).tolist()
Tensors = dict[str, torch.Tensor]


def edit(folder: Path, name: str = "config.json", **changes: object) -> Path:
    """Change keys of a JSON file; `...` takes a key away."""
    path = folder / name
    changed: dict[str, Any] = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Change the tensors of a folder with one file of weights."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def transformers_logits(folder: Path) -> np.ndarray:
    """Return what transformers computes for the tokens in float32, [tokens, vocab]."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: np.ndarray = whole(torch.tensor([TOKENS])).logits[0].numpy()
    return logits


def float_kl(folder: Path, target: str, reference: Path | None = None) -> float:
    """Return the mean KL of the float32 artifact in its real runtime against transformers.

    Args:
        folder: The folder that the artifact is made of.
        target: Name of the target.
        reference: The folder that transformers loads; None for the same.
    """
    made = load_target(target)
    with open_model(str(folder)) as model, tempfile.TemporaryDirectory() as out:
        decisions = made.decide(made.as_stored(model).model, "F32", "rtn")
        artifact = lower(made, Compression(model, decisions), "F32", Path(out)).artifact
        with OpenedArtifact(artifact, 128, 1, exact=True) as child:
            got = child.logits(TOKENS, 0)
    return float(divergence(transformers_logits(reference or folder), got).mean())
