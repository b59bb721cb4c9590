"""Lazy tensor sources, and the names of tensors in GGUF files."""

from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.model.families import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS, QK_NORMS, QKV_BIASES, layer_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    files: list[Path]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by name; reads no weights."""

    def read(self, name: str) -> Float32:
        """Return one tensor as float32, finite.

        Raises:
            InputError: the tensor holds NaN or infinity, or its bytes are missing.
        """


def require_finite(values: Float32, name: str) -> Float32:
    """Return `values` if all are finite."""
    # The sum is finite if all elements are, unless it overflows. This needs one pass and no mask.
    if not np.isfinite(values.sum(dtype=np.float64)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise InputError(
            "the tensor holds NaN or infinity",
            where=name,
            got=f"{bad} of {values.size} values",
            expected="finite numbers",
            next_step="fetch or convert the model again",
        )
    return values


GGUF_LINEARS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
GGUF_VECTORS = {
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
}


def gguf_names(layers: int) -> dict[str, str]:
    """Return Hugging Face name -> GGUF name of every tensor that a decoder of any family may have."""
    pairs = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
    for layer in range(layers):
        for role, (module, _) in LINEARS.items():
            pairs[layer_tensor(layer, f"{module}.weight")] = f"blk.{layer}.{GGUF_LINEARS[role]}.weight"
        for role, name in (NORMS | QK_NORMS | QKV_BIASES).items():
            pairs[layer_tensor(layer, name)] = f"blk.{layer}.{GGUF_VECTORS[role]}"
    return pairs


def interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Return the Hugging Face row of each GGUF row of a query or key matrix.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head; transformers rotates rows i and i + half.
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, 2, half).swapaxes(1, 2).reshape(rows)
