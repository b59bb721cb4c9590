"""Lazy tensor sources, and what is needed of GGUF files."""

from pathlib import Path
from typing import Any, Literal, Protocol

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType

from exporter.errors import InputError
from exporter.model.families import EMBEDDING, FINAL_NORM, HEAD, LINEARS, NORMS, QK_NORMS, QKV_BIASES, layer_tensor
from exporter.weights.format import Float32

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Values of one array in a GGUF header: tokens and merges of the largest vocabularies are some 600,000.
GGUF_ARRAY_MOST = 1 << 22


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
    # A sum is finite unless an element is not (or the sum overflows): one pass without a mask.
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
    """Return Hugging Face name -> GGUF name of every tensor a decoder of any family may have."""
    pairs = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
    for layer in range(layers):
        for role, (module, _) in LINEARS.items():
            pairs[layer_tensor(layer, f"{module}.weight")] = f"blk.{layer}.{GGUF_LINEARS[role]}.weight"
        for role, name in (NORMS | QK_NORMS | QKV_BIASES).items():
            pairs[layer_tensor(layer, name)] = f"blk.{layer}.{GGUF_VECTORS[role]}"
    return pairs


def interleaved_rows(rows: int, heads: int) -> np.ndarray:
    """Return for each GGUF row of a query or key matrix its row in the Hugging Face order.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, transformers rows i and i + half.
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, 2, half).swapaxes(1, 2).reshape(rows)


class QuickGgufReader(gguf.GGUFReader):
    """gguf's reader without the memory maps of single values, which cost it most of its time, and with bounds."""

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        inner = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        if inner == GGUFValueType.ARRAY or length > GGUF_ARRAY_MOST:
            raise ValueError(f"an array of {length} values of type {inner.name}")
        start = orig_offs + 12
        if inner == GGUFValueType.STRING:
            parts = self._texts(start, length)
            size = 8 * length + sum(map(len, parts))
        else:
            values = self._get(start, self.gguf_scalar_to_np[inner], length)
            parts, size = list(values.reshape(-1, 1)), values.nbytes
        return 12 + size, parts, list(range(length)), [GGUFValueType.ARRAY, *([inner] if length else [])]

    def _texts(self, offset: int, count: int) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of texts that follow one another, each after its length."""
        data = self.data.view(np.ndarray)
        order: Literal["little", "big"] = "little" if self.endianess == gguf.GGUFEndian.LITTLE else "big"
        found = []
        for _ in range(count):
            length = int.from_bytes(data[offset : offset + 8], order)
            offset += 8 + length
            if offset > len(data):
                raise ValueError("a text goes beyond the end of the file")
            found.append(data[offset - length : offset])
        return found


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file by memory map.

    Raises:
        InputError: the file is not GGUF, truncated, or its header does not hold together.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"the first bytes are {magic!r}, not b'GGUF'")
        return QuickGgufReader(path)
    except OSError as error:
        raise InputError("the GGUF file cannot be opened", where=path, got=error.strerror) from error
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        if "GGMLQuantizationType" in str(error):
            raise InputError(
                "the GGUF file holds tensors of a type that is not known",
                where=path,
                got=error,
                next_step="give the model in another type, best in F16 or BF16",
            ) from error
        raise InputError(
            "the GGUF file is truncated or damaged", where=path, got=error, next_step="fetch the file again"
        ) from error
