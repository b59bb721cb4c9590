"""Float32 artifacts of small models, and what transformers makes of the same model."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from exporter.model.sources import open_model
from exporter.prove.accuracy import Logits
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target


def in_float32(folder: Path, target: str, made: Path) -> Artifact:
    """Write a model's float32 artifact into a new folder."""
    made.mkdir()
    with open_model(str(folder)) as model:
        return load_target(target).write_float(model, made)


def continued(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Return the tokens with which transformers continues a prompt greedily, beyond the model's end tokens."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = torch.tensor([prompt])
    made = whole.generate(given, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def logits_by_transformers(folder: Path) -> Logits:
    """Return a function like that of an opened artifact, which runs transformers' whole model."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(tokens: list[int], first: int) -> np.ndarray:
        with torch.inference_mode():
            made: np.ndarray = whole(torch.tensor([tokens])).logits[0, first:].numpy()
        return made

    return logits
