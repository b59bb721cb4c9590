"""GGUF weight formats, through ggml's own quantisers and decoders in the library that llama-cpp-python ships."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from exporter.formats.format import Bytes, Float32
from exporter.formats.integers import Integers, whole_multiples
from exporter.formats.row_scaled import Int8, RowScaling, in_blocks
from exporter.foundation.cpu import available_cores
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.targets.gguf.formats.bit_layouts import LAYOUTS, Layout
from exporter.targets.gguf.formats.codebooks import LevelGrid
from exporter.targets.gguf.formats.k_quants import NESTINGS, NestedGrid, Scales


@cache
def _pool() -> ThreadPoolExecutor:
    """Return a persistent thread pool, since error feedback encodes a block at a time."""
    return ThreadPoolExecutor()


@cache
def _ggml() -> ctypes.CDLL:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = next(path for path in sorted(folder.iterdir()) if path.name.startswith(("libggml-base.", "ggml-base.")))
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    ggml.ggml_validate_row_data.restype = ctypes.c_bool
    ggml.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return ggml


class _TypeTraits(ctypes.Structure):
    """The head of ggml's `struct ggml_type_traits`."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@dataclass(frozen=True)
class GgmlFormat:
    """A ggml tensor type."""

    type: gguf.GGMLQuantizationType

    @property
    def name(self) -> str:
        """The type's own name, such as `Q4_K`."""
        return self.type.name

    @property
    def block_columns(self) -> int:
        """Weights in a block (32, or 256 for the K-quants)."""
        return gguf.GGML_QUANT_SIZES[self.type][0]

    @property
    def needs_importance(self) -> bool:
        """Whether ggml refuses to encode this type without importance."""
        return bool(_ggml().ggml_quantize_requires_imatrix(int(self.type)))

    @property
    def activation_block(self) -> int | None:
        """Number of inputs that llama.cpp rounds to 8 bits with one scale: as many as the type's own block has."""
        return None if self.block_columns == 1 else 256 if self.block_columns == 256 else 32

    def fits(self, columns: int) -> bool:
        """Return whether a row of so many weights is a whole number of blocks."""
        return columns % self.block_columns == 0

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of the tensor's data in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return rows * columns // block * size

    def encode_rows(self, weight: Float32, importance: Float32 | None) -> Bytes:
        """Encode whole rows with `ggml_quantize_chunk`, on all cores.

        Raises:
            InputError: values or importance are not finite, or importance is negative or missing; ggml would
                abort the process or encode NaN.
        """
        rows, columns = weight.shape
        if not self.fits(columns):
            raise RequestError(
                f"{self.name} cannot hold rows of {columns} weights", expected=f"a multiple of {self.block_columns}"
            )
        importance = self._checked(importance, columns)
        weight = np.ascontiguousarray(weight, np.float32)
        if not np.isfinite(weight.sum(dtype=np.float64)):
            raise InputError("the weights to encode hold NaN or infinity", where=self.name)
        encoded = np.empty((rows, self.stored_bytes(1, columns)), np.uint8)
        ggml, kind = _ggml(), int(self.type)
        pointer = None if importance is None else importance.ctypes.data
        step = -(-rows // available_cores()) or 1

        def encode(first: int) -> None:
            count = min(step, rows - first)
            source, target = weight[first:].ctypes.data, encoded[first:].ctypes.data
            ggml.ggml_quantize_chunk(kind, source, target, 0, count, columns, pointer)

        list(_pool().map(encode, range(0, rows, step)))
        return encoded

    @property
    def _integers(self) -> Integers | None:
        """The integers that the type holds, if its levels are all of so many bits and its blocks have one scale."""
        layout = LAYOUTS.get(self.name)
        if layout is None or layout.scales != 1 or (np.diff(layout.levels) != 1).any():
            return None
        return Integers(int(np.log2(len(layout.levels))), self.block_columns)

    def holds(self, integers: Integers) -> bool:
        """Return whether the type is one of integers, and blocks have one step and no more multiples than codes."""
        return self._integers is not None and self._integers.hold(integers)

    def exact_rows(self, weight: Float32) -> Bytes | None:
        """Encode weights that are whole multiples of a step, in the types that hold integers."""
        own = self._integers
        found = None if own is None else whole_multiples(weight, own.block_columns, own.bits)
        if found is None:
            return None
        multiples, steps = found
        layout = LAYOUTS[self.name]
        blocks = np.empty((steps.size, self.stored_bytes(1, self.block_columns)), np.uint8)
        blocks[:, :2] = steps.astype(np.float16).reshape(-1, 1).view(np.uint8)
        layout.put(blocks, (multiples - layout.levels[0]).astype(np.uint8).reshape(-1, self.block_columns))
        return blocks.reshape(len(weight), -1)

    def _checked(self, importance: Float32 | None, columns: int) -> Float32 | None:
        if importance is None:
            if self.needs_importance:
                raise InputError(
                    f"{self.name} cannot be encoded without importance", next_step="collect statistics first"
                )
            return None
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (columns,) or not np.isfinite(importance).all() or (importance < 0).any():
            raise InputError(
                f"the importance for {self.name} is not usable",
                got=f"shape {importance.shape}, minimum {importance.min(initial=np.inf)}",
                expected=f"{columns} finite numbers of at least 0",
            )
        return importance

    def decode_rows(self, data: Bytes, columns: int) -> Float32:
        """Decode rows as llama.cpp does, float32 [rows, columns], through ggml's `to_float`."""
        data = np.ascontiguousarray(data)
        if self.type == gguf.GGMLQuantizationType.F32:
            # A copy, since the bytes may be those of a file that is mapped for reading.
            return data.view(np.float32).copy()
        decoded = np.empty((len(data), columns), np.float32)
        to_float = _ggml().ggml_get_type_traits(int(self.type)).contents.to_float
        to_float(data.ctypes.data, decoded.ctypes.data, decoded.size)
        return decoded

    def grid(self, block: Float32, importance: Float32 | None) -> LevelGrid | None:
        """Fix the scales of one block as the reference quantiser does; None for codebook types."""
        layout = LAYOUTS.get(self.name)
        if layout is None:
            return None
        blocks = self.encode_rows(block, importance)
        # The decoded values of two codes give scale and minimum of every part, however they are stored.
        low, high = (self._decoded_everywhere(layout, blocks, code) for code in (0, len(layout.levels) - 1))
        scale = (high - low) / (layout.levels[-1] - layout.levels[0])
        minimum = low - layout.levels[0] * scale
        if self.name not in NESTINGS:
            return LevelGrid(layout, blocks, scale, minimum)
        nesting = NESTINGS[self.name]
        return NestedGrid(layout, blocks, nesting, Scales.of(nesting, blocks, scale, minimum))

    @property
    def row_scaling(self) -> RowScaling | None:
        """How Q8_0 stores rows with one scale; None for all other types."""
        return RowScaling(np.float16, self._packed) if self.type == gguf.GGMLQuantizationType.Q8_0 else None

    def _packed(self, codes: Int8, scales: Bytes) -> Bytes:
        blocks, repeated = in_blocks(codes.view(np.uint8), scales, self.block_columns)
        return np.concatenate([repeated, blocks], axis=2).reshape(len(codes), -1)

    def _decoded_everywhere(self, layout: Layout, blocks: Bytes, code: int) -> Float32:
        """Return the decoded value of one code in each part of each block, float32 [parts, rows]."""
        filled = blocks.copy()
        layout.put(filled, np.full((len(blocks), self.block_columns), code, np.uint8))
        return np.ascontiguousarray(self.decode_rows(filled, self.block_columns)[:, :: layout.columns].T)

    def join(self, blocks: list[Bytes]) -> Bytes:
        """Return encoded rows from their encoded blocks."""
        return np.concatenate(blocks, axis=1)


NOT_FOR_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "MXFP4", "NVFP4", "Q1_0", "Q2_0"}


def ggml_formats() -> dict[str, GgmlFormat]:
    """Return every type that llama.cpp loads as a weight matrix, by name."""
    return {kind.name: GgmlFormat(kind) for kind in gguf.GGMLQuantizationType if kind.name not in NOT_FOR_WEIGHTS}


def ggml_format(name: str) -> GgmlFormat:
    """Return the type of that name.

    Raises:
        RequestError: llama.cpp has no such type for weights.
    """
    formats = ggml_formats()
    if name not in formats:
        raise RequestError(f"unknown GGUF type {name!r}", next_step=did_you_mean(name, formats))
    return formats[name]


def decoded(tensor: gguf.ReaderTensor, first: int = 0, rows: int | None = None) -> Float32:
    """Return rows of a tensor of a GGUF file as llama.cpp decodes them, float32 [rows, columns]; a vector is one row.

    Args:
        tensor: The tensor.
        first: The first row.
        rows: Number of rows; None for all that follow.
    """
    columns = int(tensor.shape[0])
    data = np.ascontiguousarray(tensor.data).view(np.uint8)
    format = ggml_format(tensor.tensor_type.name)
    stored = data.reshape(-1, format.stored_bytes(1, columns))
    return format.decode_rows(stored[first:][:rows], columns)
