"""GGUF weight formats through ggml's own quantisers and decoders, in the library that llama-cpp-python ships."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from exporter.errors import InputError, RequestError, did_you_mean
from exporter.weights.format import Bytes, Float32, fitted_line, fitted_scale, squared_error
from exporter.weights.layouts import LAYOUTS, Layout
from exporter.weights.nested import NESTINGS, Nesting, Scales

ROWS_AT_ONCE = 512


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that are kept: error feedback encodes a block at a time."""
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


class _LevelGrid:
    """The codes of one block column by column.

    Args:
        layout: Of the format.
        blocks: Encoded blocks whose scales are to be kept, uint8 [rows, bytes of a block].
        scale: float32 [parts, rows], of each `layout.columns` columns.
        minimum: Likewise.
        nesting: How the scales are nested, where they are.
    """

    def __init__(
        self, layout: Layout, blocks: Bytes, scale: Float32, minimum: Float32, nesting: Nesting | None = None
    ) -> None:
        self._layout = layout
        self._nesting = nesting
        self._blocks = blocks
        self._scale = scale
        self._minimum = minimum
        self._inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        self._edges = (layout.levels[1:] + layout.levels[:-1]) / 2
        self._even = len(layout.levels) == layout.levels[-1] - layout.levels[0] + 1

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return the nearest codes, uint8 [rows], and what they decode to, float32 [rows]."""
        part = column // self._layout.columns
        levels = self._layout.levels
        scaled: Float32 = values - self._minimum[part]
        scaled *= self._inverse[part]
        if self._even:
            np.rint(scaled, out=scaled)
            np.maximum(scaled, levels[0], out=scaled)
            np.minimum(scaled, levels[-1], out=scaled)
            codes = (scaled - levels[0]).astype(np.uint8)
        else:
            codes = np.searchsorted(self._edges, scaled).astype(np.uint8)
            scaled = levels[codes]
        scaled *= self._scale[part]
        scaled += self._minimum[part]
        return codes, scaled

    def decode(self, codes: Bytes) -> Float32:
        """Return what codes, uint8 [block columns, rows], decode to, float32 of the same shape."""
        parts = self._layout.levels[codes].reshape(len(self._scale), -1, codes.shape[1])
        parts *= self._scale[:, None]
        parts += self._minimum[:, None]
        return parts.reshape(codes.shape)

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "_LevelGrid":
        """Return the grid with the scales that suit the codes best."""
        layout = self._layout
        levels = layout.levels[codes]
        if self._nesting is not None:
            return self._refit_nested(self._nesting, levels, gram, aim)
        if layout.scales == 1:
            scale, minimum = fitted_scale(levels, gram, aim), self._minimum[0]
        else:
            scale, minimum = fitted_line(levels, gram, aim)
        halves = np.stack([scale, minimum][: layout.scales], axis=1)
        with np.errstate(over="ignore"):
            stored = halves.astype(np.float16)
        stored[~np.isfinite(stored).all(axis=1)] = 0
        rounded = stored.astype(np.float32)
        new_scale, new_minimum = rounded[:, 0], rounded[:, 1] if layout.scales == 2 else minimum
        now = squared_error(self.decode(codes), gram, aim)
        better = squared_error(levels * new_scale + new_minimum, gram, aim) < now
        blocks = self._blocks.copy()
        blocks[better, : 2 * layout.scales] = stored.view(np.uint8)[better]
        return _LevelGrid(
            layout,
            blocks,
            np.where(better, new_scale, self._scale[0])[None],
            np.where(better, new_minimum, self._minimum[0])[None],
        )

    def _refit_nested(self, nesting: Nesting, levels: Float32, gram: Float32, aim: Float32) -> "_LevelGrid":
        scales = Scales.of(nesting, self._blocks, self._scale, self._minimum).refitted(nesting, levels, gram, aim)
        blocks = self._blocks.copy()
        scales.put(nesting, blocks)
        return _LevelGrid(self._layout, blocks, scales.d * scales.scales, -scales.e * scales.minima, nesting)

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block, uint8 [rows, bytes of a block]."""
        blocks = self._blocks.copy()
        self._layout.put(blocks, codes)
        return blocks


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
        """Inputs that llama.cpp rounds to 8 bits with one scale: as many as the type's own block has."""
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

        def encode(first: int) -> None:
            count = min(ROWS_AT_ONCE, rows - first)
            source, target = weight[first:].ctypes.data, encoded[first:].ctypes.data
            ggml.ggml_quantize_chunk(kind, source, target, 0, count, columns, pointer)

        list(_pool().map(encode, range(0, rows, ROWS_AT_ONCE)))
        return encoded

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
        """Return what llama.cpp decodes, float32 [rows, columns], through ggml's `to_float`."""
        data = np.ascontiguousarray(data)
        if self.type == gguf.GGMLQuantizationType.F32:
            return data.view(np.float32)
        decoded = np.empty((len(data), columns), np.float32)
        to_float = _ggml().ggml_get_type_traits(int(self.type)).contents.to_float
        to_float(data.ctypes.data, decoded.ctypes.data, decoded.size)
        return decoded

    def grid(self, block: Float32, importance: Float32 | None) -> _LevelGrid | None:
        """Fix the scales of one block as the reference quantiser does; None for types made of code books."""
        layout = LAYOUTS.get(self.name)
        if layout is None:
            return None
        blocks = self.encode_rows(block, importance)
        # What two codes decode to tells scale and minimum of every part, however they are stored.
        low, high = (self._decoded_everywhere(layout, blocks, code) for code in (0, len(layout.levels) - 1))
        scale = (high - low) / (layout.levels[-1] - layout.levels[0])
        return _LevelGrid(layout, blocks, scale, low - layout.levels[0] * scale, NESTINGS.get(self.name))

    def _decoded_everywhere(self, layout: Layout, blocks: Bytes, code: int) -> Float32:
        """Return what one code decodes to in each part of each block, float32 [parts, rows]."""
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
