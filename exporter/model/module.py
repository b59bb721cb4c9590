"""The transformers module of a model, without its weights."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from exporter.model.families import LINEARS, layer_tensor
from exporter.model.model import Model


def weightless_module(model: Model) -> nn.Module:
    """Return the module on torch's meta device, with matrices of the architecture's shapes.

    transformers has one width for all feed-forward parts; a pruned model may have one per layer.
    """
    config = model.own_config()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        for group in model.groups():
            if group.layer is None:
                continue
            linear = module.get_submodule(layer_tensor(group.layer, LINEARS[group.role][0]))
            assert isinstance(linear, nn.Linear)
            if linear.weight.shape != (group.rows, group.columns):
                linear.out_features, linear.in_features = group.rows, group.columns
                linear.weight = nn.Parameter(torch.empty(group.rows, group.columns))
    # Gradients are only taken with respect to hidden states, so nothing is stored for weight gradients.
    return module.requires_grad_(False)
