"""The target `onnx-qdq`: a decoder with static integer matrix multiplications, for NPUs and XNNPACK."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import onnx_ir as ir

from exporter.calibrate.ranges import output_place
from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten, equalised
from exporter.compress.compression import CompressedMatrix, Compression
from exporter.device.neural import NeuralProcessor
from exporter.device.profile import DeviceProfile
from exporter.formats.floats import FLOAT16
from exporter.formats.format import Float32, WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError, did_you_mean
from exporter.foundation.fitted import fitted_value
from exporter.model.family import Family
from exporter.model.model import Model
from exporter.predict.peak_memory import Weights
from exporter.predict.roofline import Throughput
from exporter.targets.artifact import Artifact
from exporter.targets.npu import processor_of
from exporter.targets.onnx.graph import DataFile, gathered, products
from exporter.targets.onnx.rounding import INT8_BLOCKS, Rounding, rounding_on
from exporter.targets.onnx.settings import DATA_FILE
from exporter.targets.onnx.supported import declared_by, lacking, limited_by, require_supported
from exporter.targets.onnx.target import Onnx
from exporter.targets.onnx_qdq.float_products import in_floats
from exporter.targets.onnx_qdq.graph import Quantiser, put_embedding, put_float_product, put_product, put_weights
from exporter.targets.onnx_qdq.npu import DATA_IN_PIPELINE
from exporter.targets.onnx_qdq.npu.folder import hindrance, write_pipeline
from exporter.targets.onnx_qdq.per_channel import ChannelFormat
from exporter.targets.onnx_qdq.readback import QdqTables


@dataclass(frozen=True)
class Scheme:
    """How activations are stored: one static scale and zero point per tensor.

    Attributes:
        codes: NumPy type of the inputs and outputs of a matrix multiplication.
        wide: Roles that use 16 bits instead, because 8 are too few: `down`, since a few tokens drive a few channels of
            the feed-forward layer to hundreds of times the usual (massive activations: Sun et al. 2024, section 2); and
            the head, whose matrix is often the embedding too, so that its channels cannot be equalised.
        weight_bits: Bits of the layers' weights; embedding and head have 8.
    """

    codes: type[np.unsignedinteger]
    wide: tuple[str, ...] = ()
    weight_bits: int = 8

    def format(self, group: WeightGroup) -> ChannelFormat:
        """Return the format of a matrix."""
        return ChannelFormat(group.columns, 8 if group.layer is None else self.weight_bits)

    def of(self, role: str) -> type[np.unsignedinteger]:
        """Return the type of the inputs and outputs of a role's matrix multiplication."""
        return np.uint16 if role in self.wide else self.codes

    def bits(self, role: str) -> int:
        """Return the bits of these inputs and outputs."""
        return np.iinfo(self.of(role)).bits


TYPES = {
    "a16w8": Scheme(np.uint16),
    "a16w4": Scheme(np.uint16, weight_bits=4),
    "a8w8": Scheme(np.uint8, wide=("down", "head", "embedding")),
}
# Inputs of the down projection are left out: their codes are wide, and the channels of `up` would become uneven.
EQUALISED = ("attention_in", "attention_out", "conv_in", "conv_out", "mlp_in", "head_in")
ALPHA = 0.5
WEIGHT_COPIES = fitted_value("exporter.targets.onnx_qdq", "weight_copies")


class OnnxQdq(Onnx):
    """A decoder in QDQ form, with the files of the target `onnx`."""

    name = "onnx-qdq"
    default_type = "a16w8"
    default_method = "ldlq"
    type_of_8_bits = "a16w8"
    # Static activations are coarser than dynamically scaled ones; a misplaced table costs nats.
    most_rounding_kl = 0.3
    states_rounding = True
    base_formats: Mapping[int, WeightFormat] = MappingProxyType({})
    factor_formats: Mapping[int, WeightFormat] = MappingProxyType({})
    graph_bytes_per_layer = 16896

    def __init__(
        self,
        rounding: Rounding = INT8_BLOCKS,
        features: Collection[str] | None = None,
        processor: NeuralProcessor | None = None,
    ) -> None:
        super().__init__(rounding, features)
        self._processor = processor

    def on(self, device: DeviceProfile) -> Self:
        """Return the target with the rounding, the kernels and the neural processor of a device."""
        return type(self)(rounding_on(device), device.isa.features, processor_of(device))

    def limits_context(self, family: Family) -> str | None:
        """Return what of a model of the family limits the context."""
        return limited_by(family)

    def lacks(self, family: Family) -> str | None:
        """Return why no model of a family can be built; None if it can."""
        return lacking(family)

    def types(self) -> list[str]:
        """Return the widths of activations and weights."""
        return list(TYPES)

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        """Return integers with one scale per row for every matrix."""
        require_supported(model)
        if type not in TYPES:
            raise RequestError(f"unknown QDQ type {type!r}", next_step=did_you_mean(type, self.types()))
        scheme = TYPES[type]
        return [
            Decision(group, method, scheme.format(group), f"{type}: {scheme.bits(group.role)}-bit activations")
            for group in model.groups()
        ]

    def storages(self, model: Model) -> list[Storage]:
        """Return the matrices, each with the only available format."""
        return [Storage((group,), (ChannelFormat(group.columns),)) for group in model.groups()]

    def stock(self, model: Model, most_bytes: int) -> list[Decision]:
        """Return nothing: there is only one format."""
        return []

    def throughput(self, group: WeightGroup, format: WeightFormat) -> Throughput:
        """Return the same speed for every matrix: there is only one format."""
        return Throughput()

    def _weights(self, model: Model, decisions: list[Decision]) -> Weights:
        held = int(WEIGHT_COPIES * self.estimated_file_bytes(model, decisions))
        return Weights(held, held)

    def rewritten(self, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model with equalised channels."""
        return equalised(model, statistics, ALPHA, EQUALISED)

    def alternatives(self, group: WeightGroup) -> Sequence[WeightFormat]:
        """Return float16 for a matrix of a layer."""
        return () if group.layer is None else (FLOAT16,)

    def reconsidered(self, given: Rewritten, decisions: list[Decision]) -> list[Decision]:
        """Return the decisions with float16 for matrices whose activations no codes hold well."""
        return in_floats(given, decisions)

    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        """Write the data file matrix by matrix, then the graph that refers to it, then the companions."""
        scheme = self._scheme(type)

        def fill(graph: ir.Graph, file: DataFile) -> None:
            _put_matrices(graph, compression, matrices, scheme, file)

        artifact = self._write(compression, folder, fill, False, False)
        if self._processor is not None and self._has_pipeline(compression.model):
            write_pipeline(compression.original, folder, self._processor)
        return artifact

    def _data_file(self, model: Model) -> str:
        """Return the place of the external data: in the pipeline's folder if there is one; see `npu.stages`."""
        return DATA_IN_PIPELINE if self._has_pipeline(model) else DATA_FILE

    def _has_pipeline(self, model: Model) -> bool:
        return self._processor is not None and hindrance(self._processor, model) is None

    def write_float(self, model: Model, folder: Path) -> Artifact:
        """Write a model in float32, as the target `onnx` does: no activation is rounded."""
        return Onnx(self._rounding).write_float(model, folder)

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        """Return a function that decodes a matrix from the artifact's bytes with ONNX Runtime's `DequantizeLinear`."""
        return QdqTables(artifact.weights[0], declared_by(model.decoder).nodes).decode

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        """Return the format of each matrix as the graph states it."""
        tables = QdqTables(artifact.weights[0], declared_by(model.decoder).nodes)
        return {group.name: tables.format_name(group) for group in model.groups()}

    def _scheme(self, type: str) -> Scheme:
        """Return the scheme of a type; a budget names no type and gets the default's activations."""
        return TYPES.get(type, TYPES[self.default_type])


def _put_matrices(
    graph: ir.Graph, compression: Compression, matrices: Iterator[CompressedMatrix], scheme: Scheme, file: DataFile
) -> None:
    decoder = compression.model.decoder
    for product, (matrix,) in gathered(products(graph, decoder), matrices):
        format, group = matrix.decision.format, matrix.decision.group
        if product is not None and not isinstance(format, ChannelFormat):
            put_float_product(graph, product, file, matrix.encoded.data)
            continue
        assert isinstance(format, ChannelFormat)
        table = None
        if group == decoder.embedding:
            table = put_embedding(graph, file, format, matrix.encoded.data)
        if product is None:
            continue
        assert product.node.name
        stem = product.node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if table is not None:
            table = table.turned(graph, product.node)
        else:
            table = put_weights(graph, file, stem, format, matrix.encoded.data)
        codes, outputs = scheme.of(group.role), compression.ranges(output_place(group.layer, group.part))
        given = Quantiser.of(graph, f"{stem}.input", codes, compression.ranges(group.site))
        put_product(graph, product, table, given, Quantiser.of(graph, f"{stem}.output", codes, outputs))


TARGET = OnnxQdq()
