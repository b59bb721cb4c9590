"""Reads GGUF files with the gguf library, adding the bounds checks that the library lacks."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from exporter.foundation.config_files import shown
from exporter.foundation.errors import InputError

# Files of the largest models have about 60 keys and a few thousand tensors.
MOST_KEYS = 1 << 12
MOST_TENSORS = 1 << 16
# Limits for all arrays together. The largest vocabularies have 800,000 texts (tokens and merges); each takes 400 bytes
# of memory until it is used.
MOST_TEXTS, MOST_NUMBERS = 1 << 20, 1 << 22
MOST_DIMENSIONS = 4
# Characters of a tensor's name; llama.cpp itself keeps 63.
MOST_NAME = 256


class BoundedGgufReader(gguf.GGUFReader):
    """gguf's reader with bounds checks, and without its slow memory maps of single values.

    The values of an array of numbers form one part.
    """

    # Fraction of the array limits used so far.
    _share = 0.0

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        order = self.byte_order if override_order is None else override_order
        return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), int(offset))

    def _build_fields(self, offs: int, count: int) -> int:
        if count > MOST_KEYS:
            raise ValueError(f"{count} keys, more than {MOST_KEYS}")
        return super()._build_fields(offs, count)

    def _push_field(self, field: gguf.ReaderField, skip_sum: bool = False) -> int:
        _require_short(field.name)
        return super()._push_field(field, skip_sum)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[npt.NDArray[Any]], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        inner = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        length = int(self._get(orig_offs + 4, np.uint64)[0])
        self._share += length / (MOST_TEXTS if inner == GGUFValueType.STRING else MOST_NUMBERS)
        if inner == GGUFValueType.ARRAY or self._share > 1:
            raise ValueError(f"an array of {length} values of type {inner.name}")
        start, types = orig_offs + 12, [GGUFValueType.ARRAY, *([inner] if length else [])]
        if inner == GGUFValueType.STRING:
            parts = self._texts(start, length)
            return 12 + 8 * length + sum(map(len, parts)), parts, list(range(length)), types
        values = self._get(start, self.gguf_scalar_to_np[inner], length)
        return 12 + values.nbytes, [values], [0], types

    def _texts(self, offset: int, count: int) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of consecutive texts, each preceded by its length."""
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

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[gguf.ReaderField]]:
        if count > MOST_TENSORS:
            raise ValueError(f"{count} tensors, more than {MOST_TENSORS}")
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list[gguf.ReaderField]) -> None:
        placed = sorted((*self._place(int(start_offs), field), field.name) for field in fields)
        for (_, end, name), (start, _, other) in pairwise(placed):
            if start < end:
                raise ValueError(f"the tensors {shown(name)} and {shown(other)} overlap")
        super()._build_tensors(start_offs, fields)

    def _place(self, start: int, field: gguf.ReaderField) -> tuple[int, int]:
        """Return the offsets of a tensor's start and end; the library computes them in 64 bits."""
        _require_short(field.name)
        _, _, _, shape, kind, offset = field.parts
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
        if not 1 <= len(shape) <= MOST_DIMENSIONS or not shape.all() or shape[0] % block:
            raise ValueError(f"the tensor {shown(field.name)} has the shape {shown(shape.tolist()[:8])}")
        first = start + int(offset[0])
        end = first + math.prod(shape.tolist()) // block * size
        if offset[0] % self.alignment or end > len(self.data):
            raise ValueError(f"the tensor {shown(field.name)} is at the bytes {first} to {end} of {len(self.data)}")
        return first, end


def _require_short(name: str) -> None:
    if len(name) > MOST_NAME:
        raise ValueError(f"a name of {len(name)} characters: {shown(name)}")


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file by memory map.

    Raises:
        InputError: the file is not GGUF, is truncated, or has an inconsistent header.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"the first bytes are {magic!r}, not b'GGUF'")
        return BoundedGgufReader(path)
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
