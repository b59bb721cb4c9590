"""How much behaviour depends on each output of each matrix: the Fisher information, collected layer by layer.

A small change D of a matrix W with inputs x moves its outputs by D x, and the model's next-token distributions by a KL
divergence of about 1/2 E[(g^T D x)^2] a token, where g is the gradient, at those outputs, of the log-likelihood of
tokens drawn from the model itself (the Fisher information is the Hessian of the KL: Martens 2020, section 9). With
g and x taken as independent (Martens and Grosse 2015, K-FAC, section 3.1) and of E[g g^T] its diagonal s alone,

    KL = 1/2 sum_i s_i (D H D^T)_ii,    H = E[x x^T],

so a row's error counts by its sensitivity s_i. Table rows that are looked up by tokens count by how often they are.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.cache import cache_folder, save_array
from exporter.calibrate.layers import LayerStream, Progress, check_finite
from exporter.calibrate.text import Windows
from exporter.model.families import LINEARS
from exporter.model.model import Model
from exporter.weights.format import Float32

VERSION = 1
POSITIONS_AT_ONCE = 512


class Sensitivities:
    """Sensitivities in files of a cache folder; read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rows(self, layer: int | None, role: str) -> Float32:
        """Return E[g^2] of each output of a matrix, float32 [rows]; the head has no layer."""
        return self._read(_name(layer, role))

    def lookups(self) -> tuple[Float32, Float32]:
        """Return how often each token is looked up, float32 [vocab], and E[g^2] of what is looked up, [hidden]."""
        return self._read("tokens"), self._read("embedding")

    def _read(self, name: str) -> Float32:
        values: Float32 = np.load(self._folder / f"{name}.npy", allow_pickle=False)
        return values


def _name(layer: int | None, role: str) -> str:
    return role if layer is None else f"layers.{layer}.{role}"


def collect_sensitivities(model: Model, windows: Windows, seed: int, progress: Progress) -> Sensitivities:
    """Run the float model forwards and backwards over the windows, one layer's weights in memory at a time.

    Args:
        model: The model.
        windows: The calibration text.
        seed: Seed of the tokens drawn from the model.
        progress: Called with layers done, each twice, and their total.
    """
    key = hashlib.sha256(f"{VERSION}:{model.digest}:{windows.digest}:{seed}".encode()).hexdigest()[:32]
    folder = cache_folder("sensitivities", key)
    found = Sensitivities(folder)
    if (folder / "embedding.npy").is_file():
        return found
    stream = LayerStream(model)
    path = folder / "inputs.partial"
    shape = (stream.layers, *windows.tokens.shape, model.architecture.hidden)
    inputs = np.memmap(path, np.float32, "w+", shape=shape)
    try:
        with torch.inference_mode():
            last = _forwards(stream, windows, inputs, progress)
        gradient = _head(stream, last, seed, folder)
        for index in reversed(range(stream.layers)):
            progress(2 * stream.layers - 1 - index, 2 * stream.layers)
            gradient = _backwards(stream, index, torch.from_numpy(inputs[index]), gradient, folder)
            check_finite(gradient, f"gradient of layer {index}")
    finally:
        del inputs
        path.unlink()
    counts = np.bincount(windows.tokens.reshape(-1), minlength=model.architecture.vocab) / windows.tokens.size
    save_array(folder / "tokens.npy", counts.astype(np.float32))
    save_array(folder / "embedding.npy", gradient.pow(2).mean(dim=(0, 1)).numpy())
    progress(2 * stream.layers, 2 * stream.layers)
    return found


def _forwards(stream: LayerStream, windows: Windows, inputs: np.ndarray, progress: Progress) -> torch.Tensor:
    """Fill in every layer's inputs and return the last layer's outputs."""
    hidden = stream.embed(windows.tokens)
    for index in range(stream.layers):
        progress(index, 2 * stream.layers)
        inputs[index] = hidden.numpy()
        with stream.layer(index) as module:
            stream.run(module, hidden)
        check_finite(hidden, f"layer {index}")
    return hidden


def _head(stream: LayerStream, hidden: torch.Tensor, seed: int, folder: Path) -> torch.Tensor:
    """Draw a token at every position; save the head's sensitivities and return the gradient at the last layer."""
    chance = torch.Generator().manual_seed(seed)
    head = stream.head()
    gradient = torch.empty_like(hidden)
    total = torch.zeros(len(head), dtype=torch.float64)
    for window in range(len(hidden)):
        with torch.enable_grad():
            outputs = hidden[window].clone().requires_grad_()
            normalised = stream.normalise(outputs)
        at_normalised = torch.empty_like(normalised)
        for first in range(0, len(normalised), POSITIONS_AT_ONCE):
            part = slice(first, first + POSITIONS_AT_ONCE)
            p = (normalised[part].detach() @ head.T).softmax(-1)
            total += (p - p * p).sum(0)  # the expectation over drawn tokens, exactly
            drawn = torch.multinomial(p, 1, generator=chance)
            p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            at_normalised[part] = p @ head
        (gradient[window],) = torch.autograd.grad(normalised, outputs, at_normalised)
    save_array(folder / "head.npy", (total / hidden[..., 0].numel()).float().numpy())
    return gradient


def _backwards(
    stream: LayerStream, index: int, inputs: torch.Tensor, gradient: torch.Tensor, folder: Path
) -> torch.Tensor:
    """Save one layer's sensitivities and return the gradient at its inputs, float32 [windows, length, hidden]."""
    before = torch.empty_like(gradient)
    with stream.layer(index) as module, _observed(module) as sums:
        for part, outputs, given in stream.differentiable(module, inputs):
            (before[part],) = torch.autograd.grad(outputs, given, gradient[part])
    for role, total in sums.items():
        save_array(folder / f"{_name(index, role)}.npy", (total / gradient[..., 0].numel()).numpy())
    return before


@contextmanager
def _observed(module: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Sum the squares of the gradients at the outputs of a layer's matrices while it is derived."""
    sums: dict[str, torch.Tensor] = {}

    def add(role: str, gradient: torch.Tensor) -> None:
        total = gradient.pow(2).sum(dim=(0, 1))
        sums[role] = sums[role] + total if role in sums else total

    def watch(role: str, output: torch.Tensor) -> None:
        output.register_hook(partial(add, role))  # type: ignore[no-untyped-call]

    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _, __, output, role=role: watch(role, output))
        for role, (path, _) in LINEARS.items()
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
