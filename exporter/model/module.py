"""The transformers module of a model, without its weights."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from exporter.model.model import Model


def weightless_module(model: Model) -> nn.Module:
    """Return the module on torch's meta device, with matrices of the architecture's shapes.

    transformers has one width for all feed-forward parts; a pruned model may have one per layer.
    """
    config = model.own_config()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        layers: nn.ModuleList = module.get_submodule("model.layers")  # type: ignore[assignment]
        for block, layer in zip(model.decoder.blocks, layers, strict=True):
            for linear in block.linears.values():
                _resize(layer.get_submodule(linear.module), linear.group.rows, linear.group.columns)
    # Gradients are only taken with respect to hidden states, so nothing is stored for weight gradients.
    return module.requires_grad_(False)


def _resize(linear: nn.Module, rows: int, columns: int) -> None:
    assert isinstance(linear, nn.Linear)
    if linear.weight.shape != (rows, columns):
        linear.out_features, linear.in_features = rows, columns
        linear.weight = nn.Parameter(torch.empty(rows, columns))
