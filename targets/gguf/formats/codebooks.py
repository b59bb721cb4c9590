"""Blocks of levels times a scale, with or without a minimum; see `exporter.targets.gguf.formats.bit_layouts`."""

import numpy as np

from exporter.formats.format import Bytes, Float32, fitted_line, fitted_scale, squared_error
from exporter.targets.gguf.formats.bit_layouts import Layout


class LevelGrid:
    """Chooses the codes of one block column by column.

    Args:
        layout: Layout of the format.
        blocks: Encoded blocks whose scales are kept, uint8 [rows, bytes of a block].
        scale: float32 [parts, rows], one per `layout.columns` columns.
        minimum: Likewise.
    """

    def __init__(self, layout: Layout, blocks: Bytes, scale: Float32, minimum: Float32) -> None:
        self._layout = layout
        self._blocks = blocks
        self._scale = scale
        self._minimum = minimum
        self._inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        self._edges = (layout.levels[1:] + layout.levels[:-1]) / 2
        self._even = len(layout.levels) == layout.levels[-1] - layout.levels[0] + 1

    def round(self, column: int, values: Float32) -> tuple[Bytes, Float32]:
        """Return the nearest codes, uint8 [..., rows], and their decoded values, float32 likewise.

        Args:
            column: Column of the values, or the first of several that share their scales.
            values: float32 [..., rows].
        """
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
        """Decode codes, uint8 [block columns, rows], to float32 of the same shape."""
        parts = self._layout.levels[codes].reshape(len(self._scale), -1, codes.shape[1])
        parts *= self._scale[:, None]
        parts += self._minimum[:, None]
        return parts.reshape(codes.shape)

    def refit(self, codes: Bytes, gram: Float32, aim: Float32) -> "LevelGrid":
        """Return the grid with the best scales for the codes."""
        layout = self._layout
        levels = layout.levels[codes]
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
        return LevelGrid(
            layout,
            blocks,
            np.where(better, new_scale, self._scale[0])[None],
            np.where(better, new_minimum, self._minimum[0])[None],
        )

    def pack(self, codes: Bytes) -> Bytes:
        """Return the encoded block, uint8 [rows, bytes of a block]."""
        blocks = self._blocks.copy()
        self._layout.put(blocks, codes)
        return blocks
