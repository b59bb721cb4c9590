"""What llama.cpp's own quantiser makes of a model: its named mixes, and mixes that a careful user would put together.

The importance is llama-imatrix's own, the mean square of each input, computed here from transformers' modules and on
as much text as that tool is usually given, so that the opponent owes nothing to the exporter's statistics.
"""

import ctypes
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import nn
from transformers import AutoModelForCausalLM

from exporter.calibrate.windows import Tokens
from exporter.child.process import Child
from exporter.compress.compression import Compression
from exporter.formats.format import Float32
from exporter.model.decoder import EMBEDDING, HEAD
from exporter.model.gguf_names import gguf_names
from exporter.model.model import Model
from exporter.targets.artifact import Artifact
from exporter.targets.contract import load_target, lower
from exporter.targets.gguf.quantise import quantise_parameters

MIXES = ("Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_XXS", "IQ2_M")

# As for llama-quantize: `--pure`, `--token-embedding-type` for token_embd, `--tensor-type` for the rest, then the type
# of all other matrices. The first name that fits a tensor decides. A width of 576 leaves the types with blocks of 32.
OUTER_2 = r"blk\.(0|1|28|29)\."
OUTER_3 = r"blk\.([0-2]|2[789])\."
OUTER_4 = r"blk\.([0-3]|2[6789])\."
HAND_MADE = {
    "Q5_K_M": (
        "token_embd=Q8_0 ffn_up=Q5_0 ffn_down=Q6_K Q5_1",
        "token_embd=Q5_1 ffn_down=Q8_0 Q5_1",
        "token_embd=Q5_1 attn=Q8_0 ffn_up=Q5_0 ffn_down=Q6_K Q5_1",
        "token_embd=Q5_0 attn=Q8_0 ffn_down=Q6_K Q5_1",
        f"token_embd=Q5_1 {OUTER_2}=Q8_0 attn_[kv]=Q8_0 ffn_down=Q6_K Q5_1",
        r"token_embd=Q8_0 blk\.(0|29)\.=Q8_0 ffn_down=Q6_K Q5_0",
        "token_embd=Q8_0 attn_[kv]=Q8_0 ffn_down=Q6_K Q5_0",
        "token_embd=Q5_1 attn_(k|v|output)=Q8_0 ffn_down=Q6_K Q5_1",
    ),
    "Q4_K_M": (
        "token_embd=Q8_0 ffn_down=Q5_K Q5_0",
        "token_embd=Q5_1 ffn_down=Q6_K Q5_1",
        "token_embd=Q5_0 attn_[kv]=Q8_0 ffn_down=Q6_K Q5_1",
        "token_embd=IQ4_NL attn=Q8_0 ffn_down=Q6_K Q5_0",
        "token_embd=Q5_1 attn_(v|output)=Q8_0 attn_[qk]=Q5_1 ffn_down=Q5_K Q5_0",
        "token_embd=Q8_0 ffn_(gate|up)=Q4_1 ffn_down=Q6_K Q5_0",
        "token_embd=Q8_0 attn=Q5_1 ffn_down=Q6_K IQ4_NL",
        f"token_embd=Q5_0 {OUTER_3}=Q8_0 ffn_down=Q6_K Q5_0",
    ),
    "Q3_K_M": (
        "token_embd=Q8_0 attn_v=Q8_0 ffn_down=Q4_K IQ4_NL",
        "token_embd=Q5_1 attn=Q5_0 ffn_down=Q6_K IQ4_NL",
        "token_embd=Q5_0 ffn_up=Q4_1 ffn_down=Q5_K Q5_0",
        "token_embd=Q5_1 attn=Q5_1 ffn_down=Q4_K Q4_1",
        "token_embd=IQ4_NL attn_v=Q8_0 ffn_down=Q5_K Q5_0",
        f"token_embd=Q5_0 ffn_down=Q6_K {OUTER_4}=Q5_1 IQ4_NL",
        "token_embd=Q8_0 attn=Q5_0 ffn_down=Q3_K IQ4_NL",
        "token_embd=Q5_1 attn_v=Q8_0 ffn_down=Q5_K Q4_1",
    ),
    "IQ4_XS": (
        "token_embd=IQ4_NL ffn_down=Q5_K Q5_0",
        "token_embd=Q5_1 ffn_down=Q6_K IQ4_NL",
        "token_embd=Q5_0 attn_v=Q8_0 attn=Q5_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=Q5_0 attn_v=Q8_0 ffn_down=Q6_K IQ4_NL",
        "token_embd=IQ4_NL attn=Q5_1 ffn_down=Q5_K Q4_1",
        f"token_embd=Q5_0 ffn_down=Q5_K {OUTER_3}=Q5_1 IQ4_NL",
        "token_embd=Q5_1 attn=Q5_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=Q8_0 attn=Q5_0 ffn_down=IQ3_XXS IQ4_NL",
    ),
    "IQ3_XXS": (
        "token_embd=Q5_1 ffn_down=Q5_K IQ4_NL",
        "token_embd=Q5_0 attn_v=Q8_0 attn=Q5_0 ffn_down=Q4_K IQ4_NL",
        "token_embd=IQ4_NL attn_v=Q8_0 ffn_down=Q6_K IQ4_NL",
        "token_embd=IQ4_NL attn_v=Q8_0 attn=Q5_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=IQ4_NL attn=Q5_1 ffn_down=Q5_K IQ4_NL",
        "token_embd=Q5_0 attn_v=Q8_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=Q4_1 attn_v=Q8_0 ffn_down=Q4_K Q4_1",
        "token_embd=Q8_0 ffn_down=Q2_K IQ4_NL",
    ),
    "IQ2_M": (
        "token_embd=Q5_1 attn_v=Q8_0 ffn_down=Q4_K IQ4_NL",
        "token_embd=Q5_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=IQ4_NL ffn_down=Q6_K IQ4_NL",
        "token_embd=IQ4_NL attn=Q5_0 ffn_down=Q5_K IQ4_NL",
        "token_embd=IQ4_NL attn_v=Q8_0 attn=Q5_1 ffn_down=Q4_K IQ4_NL",
        "token_embd=Q5_0 attn_v=Q8_0 attn_output=Q5_1 ffn_down=Q4_K IQ4_NL",
        f"token_embd=IQ4_NL ffn_down=Q5_K {OUTER_4}=Q5_1 IQ4_NL",
        "token_embd=Q8_0 ffn_down=IQ2_S IQ4_NL",
    ),
}


@torch.inference_mode()
def importance(model: Model, windows: Tokens) -> dict[str, Float32]:
    """Return GGUF name -> E[x^2] of the inputs of each matrix, float32 [columns], from int64 [windows, length]."""
    whole = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    linears = {f"{name}.weight": module for name, module in whole.named_modules() if isinstance(module, nn.Linear)}
    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linears.items()}
    hooks = [module.register_forward_pre_hook(partial(_add, sums[name])) for name, module in linears.items()]
    for window in torch.from_numpy(windows):
        hidden = whole.model(window[None], use_cache=False).last_hidden_state
        _add(sums[HEAD], whole.lm_head, (hidden,))
    for hook in hooks:
        hook.remove()
    names = gguf_names(model.decoder)
    stored = {HEAD: EMBEDDING} if model.decoder.tied else {}
    return {
        names[stored.get(name, name)]: (total / windows.size).numpy().astype(np.float32) for name, total in sums.items()
    }


def _add(total: torch.Tensor, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    total += inputs[0][0].square().sum(0)


def floats(model: Model, folder: Path) -> Path:
    """Write the model as an F32 GGUF, which llama.cpp quantises."""
    folder.mkdir()
    target = load_target("gguf")
    decisions = target.decide(model, "F32", "rtn")
    (path,) = lower(target, Compression(model, decisions), "F32", folder).artifact.weights
    return path


def quantised(source: Path, folder: Path, asked: str, importance: dict[str, Float32]) -> Artifact:
    """Let llama.cpp quantise a GGUF.

    Args:
        source: The F32 file.
        folder: Is made.
        asked: A named mix such as `Q4_K_M`, or types such as `token_embd=Q5_1 ffn_down=Q6_K Q5_0`.
        importance: GGUF name -> E[x^2].
    """
    folder.mkdir()
    path = folder / "model.gguf"
    with Child("llama.cpp's quantiser", (8 << 30) + source.stat().st_size) as child:
        assert child.run(_quantise, 3600, source, path, asked, importance) == 0
    return Artifact("gguf", folder, (path,))


def _quantise(source: Path, target: Path, asked: str, importance: dict[str, Float32]) -> int:
    *chosen, base = asked.split()
    types = dict(choice.rsplit("=", 1) for choice in chosen)
    parameters = quantise_parameters(base, importance)
    if types:
        parameters.pure = True
        parameters.token_embedding_type = GGMLQuantizationType[types.pop("token_embd")]
        overrides = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
        for override, (pattern, kind) in zip(overrides, types.items(), strict=False):
            override.pattern, override.type = pattern.encode(), GGMLQuantizationType[kind]
        parameters.tt_overrides = ctypes.cast(overrides, type(parameters.tt_overrides))
    return int(llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)))
