"""The transformers module of a model, without its weights."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from exporter.formats.group import WeightGroup
from exporter.model.blocks import Block
from exporter.model.model import Model


def weightless_module(model: Model) -> nn.Module:
    """Return the module on torch's meta device, with tensors of a checkpoint's shapes.

    transformers has one width for all feed-forward parts; a pruned model may have one per layer.
    """
    config = model.own_config()
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
        layers: nn.ModuleList = module.get_submodule("model.layers")  # type: ignore[assignment]
        for block, layer in zip(model.decoder.blocks, layers, strict=True):
            for path, parts in matrices_by_module(block).items():
                _resize(layer.get_submodule(path), sum(part.rows for part in parts), parts[0].columns)
    # Gradients are only taken with respect to hidden states, so nothing is stored for weight gradients.
    return module.requires_grad_(False)


def matrices_by_module(block: Block) -> dict[str, list[WeightGroup]]:
    """Return path of transformers' module, within a layer -> the matrices whose rows its weight holds."""
    found: dict[str, list[WeightGroup]] = {}
    for linear in block.linears.values():
        path = linear.module if linear.stored_in is None else linear.module.rpartition(".")[0]
        found.setdefault(path, []).append(linear.group)
    return found


def separate(layer: nn.Module, block: Block) -> None:
    """Give each module that multiplies by several matrices at once a part for each, named as its role."""
    with torch.device("meta"):
        for path, groups in matrices_by_module(block).items():
            if len(groups) > 1:
                layer.set_submodule(path, _SideBySide(groups))


class _SideBySide(nn.ModuleDict):
    """Multiplies by several matrices; the outputs stand side by side."""

    def __init__(self, groups: Iterable[WeightGroup]) -> None:
        super().__init__({group.role: nn.Linear(group.columns, group.rows, bias=False) for group in groups})
        self.requires_grad_(False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return [..., rows of all], for [..., columns]."""
        return torch.cat([part(given) for part in self.values()], -1)


def _resize(linear: nn.Module, rows: int, columns: int) -> None:
    assert isinstance(linear, nn.Linear)
    if linear.weight.shape != (rows, columns):
        linear.out_features, linear.in_features = rows, columns
        linear.weight = nn.Parameter(torch.empty(rows, columns))
