"""The file of a GGUF model's low-rank factors, fitted or of an adapter: llama.cpp applies it as a LoRA adapter.

For a matrix NAME, `NAME.lora_a` is R and `NAME.lora_b` is L. llama.cpp multiplies their product by alpha / rank, or by
1 if alpha is 0. With alpha 0, every matrix can have its own rank and a scaling of its own, which is in L.
"""

from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np

from exporter.formats.format import EncodedFactors, Float32, LowRank
from exporter.formats.group import Decision, WeightGroup
from exporter.model.decoder import Decoder
from exporter.model.gguf_names import gguf_names
from exporter.model.gguf_reader import open_gguf
from exporter.model.model import Model
from exporter.targets.gguf.adapter_keys import AdapterText, add_text
from exporter.targets.gguf.feed_forward_widths import feed_forward_storage
from exporter.targets.gguf.formats.ggml import decoded, ggml_format
from exporter.targets.gguf.header import finish_header

RIGHT, LEFT = "lora_a", "lora_b"


class AdapterWriter:
    """Writes the adapter of a model, matrix by matrix in the order of the decisions.

    Args:
        path: Path of the file.
        decoder: The model's.
        name: Name of the model.
        decisions: Decisions with factors, in the order in which `add` is called.
        text: Chat template and end tokens of a fine-tune; None if those of the model count.
    """

    def __init__(
        self, path: Path, decoder: Decoder, name: str, decisions: Iterable[Decision], text: AdapterText | None = None
    ) -> None:
        self._writer = gguf.GGUFWriter(path, feed_forward_storage(decoder).architecture)
        self._writer.add_type(gguf.GGUFType.ADAPTER)
        self._writer.add_name(name)
        if text is not None:
            add_text(self._writer, text)
        self._writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        self._writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
        names = gguf_names(decoder)
        for decision in decisions:
            assert decision.beside is not None
            format, rank = decision.beside.format, decision.beside.rank
            kind = gguf.GGMLQuantizationType[format.name]
            group = decision.group
            for part, rows, columns in ((RIGHT, rank, group.columns), (LEFT, group.rows, rank)):
                shape = (rows, format.stored_bytes(1, columns))
                size = format.stored_bytes(rows, columns)
                self._writer.add_tensor_info(f"{names[group.name]}.{part}", shape, np.dtype(np.uint8), size, kind)
        finish_header(self._writer)

    def add(self, factors: EncodedFactors, order: np.ndarray | None) -> None:
        """Write the factors of the next matrix; `order` lists the source row of each stored row."""
        self._writer.write_tensor_data(factors.right)
        self._writer.write_tensor_data(factors.left if order is None else factors.left[order])

    def close(self) -> None:
        """Finish the file."""
        self._writer.close()


class Adapter:
    """The factors in an adapter file.

    Args:
        path: The file; None if there are no factors.
        model: The model that it belongs to.
    """

    def __init__(self, path: Path | None, model: Model) -> None:
        self._tensors = {} if path is None else {tensor.name: tensor for tensor in open_gguf(path).tensors}
        self._names = gguf_names(model.decoder)

    def low_rank(self, group: WeightGroup) -> LowRank | None:
        """Return the rank and format of a matrix's factors as the file states them; None if it has no factors."""
        left = self._tensors.get(f"{self._names[group.name]}.{LEFT}")
        return None if left is None else LowRank(int(left.shape[0]), ggml_format(left.tensor_type.name))

    def decode(self, group: WeightGroup) -> tuple[Float32, Float32] | None:
        """Return L, rows in the file's order, and R as llama.cpp decodes them; None if there are no factors."""
        if self.low_rank(group) is None:
            return None
        left, right = (decoded(self._tensors[f"{self._names[group.name]}.{part}"]) for part in (LEFT, RIGHT))
        return left, right
