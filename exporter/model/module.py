"""The transformers module of a model, without its weights."""

from collections.abc import Callable, Iterable
from typing import Any, cast

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
            for path, parts in _matrices_by_module(block).items():
                own = layer.get_submodule(path)
                # Routers and experts have a shape of their own, which the config states.
                if isinstance(own, nn.Linear):
                    _resize(own, sum(part.rows for part in parts), parts[0].columns)
    # Gradients are only taken with respect to hidden states, so nothing is stored for weight gradients.
    return module.requires_grad_(False)


def separate(layer: nn.Module, block: Block) -> None:
    """Give each module that multiplies by several matrices a module for each, at the path that the block names."""
    with torch.device("meta"):
        for path, groups in _matrices_by_module(block).items():
            if groups[0].expert is not None:
                own: Any = layer.get_submodule(path)
                layer.set_submodule(path, _Experts(groups, own.act_fn))
            elif len(groups) > 1:
                layer.set_submodule(path, _SideBySide(groups))


def _matrices_by_module(block: Block) -> dict[str, list[WeightGroup]]:
    """Return path of transformers' module, within a layer -> the matrices that it multiplies by."""
    found: dict[str, list[WeightGroup]] = {}
    for linear in block.linears.values():
        found.setdefault(linear.stacked_in or linear.module, []).append(linear.group)
    return found


def _linears(groups: Iterable[WeightGroup]) -> dict[str, nn.Module]:
    return {group.role: nn.Linear(group.columns, group.rows, bias=False) for group in groups}


class _SideBySide(nn.ModuleDict):
    """Multiplies by several matrices; the outputs stand side by side."""

    def __init__(self, groups: Iterable[WeightGroup]) -> None:
        super().__init__(_linears(groups))
        self.requires_grad_(False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return [..., rows of all], for [..., columns]."""
        return torch.cat([part(given) for part in self.values()], -1)


class _Experts(nn.ModuleList):
    """Gated experts: each token is computed by some of them, whose outputs are added with weights."""

    def __init__(self, groups: Iterable[WeightGroup], activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        by_expert: dict[int | None, list[WeightGroup]] = {}
        for group in groups:
            by_expert.setdefault(group.expert, []).append(group)
        super().__init__(nn.ModuleDict(_linears(own)) for own in by_expert.values())
        self.act_fn = activation
        self.requires_grad_(False)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the outputs, [tokens, hidden].

        Args:
            hidden: [tokens, hidden].
            chosen: The experts of each token, int64 [tokens, used].
            weights: Their weights, [tokens, used].
        """
        total = torch.zeros_like(hidden)
        for number, expert in enumerate(cast(Iterable[nn.ModuleDict], self)):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                # A window, as hooks expect it: [1, tokens, hidden].
                given = hidden[tokens][None]
                made = expert["expert_down"](self.act_fn(expert["expert_gate"](given)) * expert["expert_up"](given))[0]
                total = total.index_add(0, tokens, made * weights[tokens, places, None])
        return total


def _resize(linear: nn.Module, rows: int, columns: int) -> None:
    assert isinstance(linear, nn.Linear)
    if linear.weight.shape != (rows, columns):
        linear.out_features, linear.in_features = rows, columns
        linear.weight = nn.Parameter(torch.empty(rows, columns))
