"""LoRA adapters in PEFT's format that the tests make from a seed, and the merged models, computed independently."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
RANK, ALPHA = 4, 12
PREFIX = "base_model.model."


def tiny_adapter(
    folder: Path,
    base: Path,
    *,
    modules: Sequence[str] = LINEARS,
    ranks: Mapping[str, int] = MappingProxyType({}),
    copies: Mapping[str, torch.Tensor] = MappingProxyType({}),
    **keys: object,
) -> Path:
    """Write a random adapter of a model as PEFT's `save_pretrained` writes it.

    Args:
        folder: Where.
        base: The model's folder, which adapter_config.json names by its path.
        modules: Ends of the names of the modules with factors.
        ranks: Name of a module -> its rank.
        copies: Name of a tensor -> what replaces it.
        keys: Other keys of adapter_config.json; `...` takes a key away.
    """
    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(1)
    tensors: Tensors = {PREFIX + name: one.contiguous() for name, one in copies.items()}
    for name, matrix in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in modules:
            (rows, columns), rank = matrix.shape, ranks.get(module, RANK)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns, generator=chance) * 0.05
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank, generator=chance) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "target_modules": list(modules), "bias": "none", "lora_dropout": 0.05,
        "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "init_lora_weights": True, "inference_mode": True, "rank_pattern": {}, "alpha_pattern": {}, "revision": None,
    } | keys  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def merged(folder: Path, base: Path, adapter: Path, alphas: Mapping[str, float] = MappingProxyType({})) -> Path:
    """Write the model that an adapter makes of its base, in float64 arithmetic, as a folder for transformers."""
    shutil.copytree(base, folder)
    config, held = json.loads((adapter / "adapter_config.json").read_text()), load_file(base / "model.safetensors")
    changes = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in changes.items():
        bare = name.removeprefix(PREFIX)
        if ".lora_" not in bare:
            held[bare] = tensor
    for name, b in changes.items():
        if name.endswith(".lora_B.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_B.weight")
            a = changes[name.replace(".lora_B.", ".lora_A.")]
            rank = math.sqrt(len(a)) if config["use_rslora"] else len(a)
            product = b.double() @ a.double() * (alphas.get(module, config["lora_alpha"]) / rank)
            held[f"{module}.weight"] = (held[f"{module}.weight"].double() + product).float()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
