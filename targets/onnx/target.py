"""The target `onnx`: a decoder for ONNX Runtime and onnxruntime-genai, with matrices in `MatMulNBits`."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import onnx
import onnx_ir as ir

from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten, scaled_if_fitted
from exporter.compress.checks import check_formats
from exporter.compress.compression import CompressedMatrix, Compression
from exporter.compress.method import AS_STORED
from exporter.device.profile import DeviceProfile
from exporter.formats.floats import FLOAT16, FLOAT32
from exporter.formats.format import Float32, WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.cache import replacing, scratch_folder
from exporter.foundation.errors import RequestError, did_you_mean
from exporter.foundation.fitted import fitted_value
from exporter.model.family import Family
from exporter.model.model import Model
from exporter.predict.peak_memory import Peak, Weights, host_features
from exporter.predict.roofline import Throughput
from exporter.targets.artifact import Artifact
from exporter.targets.contract import AsStored, Target, lower, shape_of, with_codes
from exporter.targets.kernel_speeds import speeds_on
from exporter.targets.onnx.companions import write_text_alone
from exporter.targets.onnx.factors import add_factors
from exporter.targets.onnx.graph import (
    ALIGNED_FROM_BYTES,
    EMBEDDING_WEIGHT,
    PAGE_BYTES,
    SMALL_ALIGNMENT_BYTES,
    DataFile,
    gathered,
    move_rest,
    products,
    put_embedding,
    put_floats,
    put_matrix,
    put_table,
)
from exporter.targets.onnx.intake import require_known
from exporter.targets.onnx.matmulnbits import MatMulNBitsFormat, matmulnbits_format, matmulnbits_formats
from exporter.targets.onnx.memory import held_weights, process_peak
from exporter.targets.onnx.readback import Tables
from exporter.targets.onnx.rounding import INT8_BLOCKS, Rounding, rounding_on
from exporter.targets.onnx.settings import DATA_FILE, MODEL_FILE
from exporter.targets.onnx.skeleton import build_skeleton
from exporter.targets.onnx.supported import context_length, declared_by, lacking, limited_by, require_supported

NAMED = {"int4": "int4-b32", "int8": "int8-b32"}
FLOAT = FLOAT32.name

# Formats that onnxruntime-genai's builder uses for the head (with a tied embedding) and for the rest, largest first.
STOCK = (("int8-b32-f32", "int8-b32-f32"), ("int8-b32-f32", "int4-b32-f32"), ("int4-b32-f32", "int4-b32-f32"))
# The formats offered for a budget: fast ones, each the best of its size on the reference model's matrices. At 2 bits,
# zero points gain less than their bytes do elsewhere; 8 bits do not need them. Rows are not padded: at a width of 576,
# blocks of 128 would take 640 columns, which is more bytes than blocks of 64, with coarser scales.
ALPHABET = (
    "int2-b128", "int2-b64", "int2-b32",
    "int4-b256", "int4-b128", "int4-b128-asymmetric", "int4-b64", "int4-b64-asymmetric", "int4-b32",
    "int4-b32-asymmetric", "int4-b16", "int4-b16-asymmetric",
    "int8-b128", "int8-b64", "int8-b32",
)  # fmt: skip
# Zero points would only repeat the middle code.
SYMMETRIC = tuple(one for one in matmulnbits_formats().values() if not one.asymmetric and one.scale_type is np.float16)


class Onnx(Target):
    """model.onnx with its external data, genai_config.json and the tokenizer.

    Args:
        rounding: How the runtime rounds activations on the target device.
        features: Of its processor, named as in device profiles; None for this machine's.
    """

    name = "onnx"
    default_type = "int4"
    default_method = "ldlq"
    type_of_8_bits = "int8"
    most_rounding_kl = 0.1
    decode_margin = fitted_value("exporter.targets.onnx", "decode_margin")
    # At 2 bits larger blocks take fewer bytes, but the runtime rounds inputs in the same blocks, twice as coarsely.
    base_formats: Mapping[int, WeightFormat] = MappingProxyType(
        {bits: matmulnbits_format(name) for bits, name in {2: "int2-b32", 4: "int4-b32", 8: "int8-b32"}.items()}
    )
    factor_formats: Mapping[int, WeightFormat] = MappingProxyType(
        {4: matmulnbits_format("int4-b32"), 8: matmulnbits_format("int8-b32"), 16: FLOAT16}
    )
    # Bytes of a layer's nodes and initialisers in the reference model: 9,792 with all zero points, 8,575 without.
    graph_bytes_per_layer = 9792

    def __init__(self, rounding: Rounding = INT8_BLOCKS, features: Collection[str] | None = None) -> None:
        self._rounding = rounding
        self._speeds = speeds_on("exporter.targets.onnx", host_features() if features is None else features)

    def on(self, device: DeviceProfile) -> Self:
        """Return the target with the rounding and the kernels for a device."""
        return type(self)(rounding_on(device), device.isa.features)

    def limits_context(self, family: Family) -> str | None:
        """Return what of a model of the family limits the context."""
        return limited_by(family)

    def lacks(self, family: Family) -> str | None:
        """Return why no model of a family can be built; None if it can."""
        return lacking(family)

    def types(self) -> list[str]:
        """Return the short names, every single format, and the formats that hold the integers of a source."""
        return [*NAMED, FLOAT, *matmulnbits_formats(), AS_STORED]

    def context_length(self, model: Model) -> int:
        """Return the number of positions for which the graph computes what the model does."""
        return context_length(model)

    def as_stored(self, model: Model) -> AsStored:
        """Return the model as it is."""
        require_supported(model)
        return AsStored(model, "every layer of the graph has its own shapes")

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        """Return the same format for every matrix; a tied embedding and head share one storage."""
        require_supported(model)
        if type not in self.types():
            raise RequestError(f"unknown ONNX type {type!r}", next_step=did_you_mean(type, self.types()))
        if type == AS_STORED:
            return self._as_stored(model)
        name = NAMED.get(type, type)
        format: WeightFormat = FLOAT32 if name == FLOAT else matmulnbits_format(name)
        reason = f"{type} for every matrix" + (f"; {self._rounding.reason}" if name != FLOAT else "")
        decisions = with_codes(model, [Decision(group, method, format, reason) for group in model.groups()])
        check_formats(decisions, [*map(matmulnbits_format, matmulnbits_formats()), FLOAT32])
        return decisions

    def _as_stored(self, model: Model) -> list[Decision]:
        """Return the smallest format for the matrices of each storage that holds the codes of the source.

        Raises:
            RequestError: no format holds those of a matrix.
        """
        found: dict[str, WeightFormat] = {}
        for storage in self.storages(model):
            formats = list(SYMMETRIC)
            for group in storage.groups:
                formats = [one for one in formats if model.has_codes(group.name, one)]
                if not formats:
                    raise RequestError(
                        "no format of the target holds the codes of the source", where=group.name,
                        got=model.stored_type(group.name) or "floats",
                        expected="a GGUF file whose types have one scale for each block, without offsets: "
                        "Q4_0, Q5_0 and Q8_0",
                        next_step="choose another type, or the target gguf, which holds every type of a GGUF file",
                    )  # fmt: skip
            best = min(formats, key=lambda format: format.stored_bytes(1, storage.groups[0].columns))
            found |= {group.name: best for group in storage.groups}
        reason = f"the smallest that holds the codes of the source; {self._rounding.reason}"
        return [Decision(group, AS_STORED, found[group.name], reason) for group in model.groups()]

    def storages(self, model: Model) -> list[Storage]:
        """Return the matrices; query, key and value of a layer are one storage.

        They could differ in format if stored apart, but on the reference model a token takes 1.18 times as long.
        """
        together: dict[object, list[WeightGroup]] = {}
        for group in model.groups():
            together.setdefault((group.layer, "qkv") if group.role in ("q", "k", "v") else group.name, []).append(group)
        formats = map(matmulnbits_format, ALPHABET)
        alphabet = [format for format in formats if format.bits in self._rounding.quick_bits]
        return [
            Storage(tuple(groups), tuple(format for format in alphabet if format.fits(groups[0].columns)))
            for groups in together.values()
        ]

    def stock(self, model: Model, most_bytes: int) -> list[Decision]:
        """Return the builder's default formats, or 8 bits for the head or for all matrices if they fit."""
        for head, rest in STOCK:
            decisions = [
                Decision(group, "rtn", matmulnbits_format(name), "as the builder makes it")
                for group in model.groups()
                for name in [head if "head" in group.uses else rest]
            ]
            if sum(decision.stored_bytes for decision in decisions) <= most_bytes:
                return decisions
        return []

    def throughput(self, group: WeightGroup, format: WeightFormat) -> Throughput:
        """Return the measured speed of `MatMulNBits` with a format."""
        return self._speeds[format.name.removesuffix("-f32")]

    def fixed_bytes(self, model: Model) -> int:
        """Return the size of vectors, rotary tables and graph, plus the most that alignment takes."""
        aligned = sum(PAGE_BYTES if group.size >= ALIGNED_FROM_BYTES else 0 for group in model.groups())
        small = 4 * SMALL_ALIGNMENT_BYTES * (len(model.groups()) + len(model.decoder.vectors()))
        return (
            self._vectors_and_rotary(model) + self.graph_bytes_per_layer * (model.decoder.layers + 2) + aligned + small
        )

    def _vectors_and_rotary(self, model: Model) -> int:
        shape = model.decoder
        vectors = sum(4 * int(np.prod(dims)) for dims in shape.vectors().values())
        tables = 2 * len(shape.family.rotary_kinds)
        return vectors + tables * 4 * context_length(model) * shape.rotary_width // 2

    def estimated_file_bytes(self, model: Model, decisions: list[Decision]) -> int:
        """Return the size of matrices, vectors, rotary tables and graph."""
        matrices = sum(decision.stored_bytes for decision in decisions)
        return matrices + self._vectors_and_rotary(model) + self.graph_bytes_per_layer * model.decoder.layers

    def estimated_peak(self, model: Model, decisions: list[Decision], context: int) -> Peak:
        """Return the memory of ONNX Runtime's process."""
        return process_peak(shape_of(model.decoder), self._weights(model, decisions), context)

    def _weights(self, model: Model, decisions: list[Decision]) -> Weights:
        rest = self.estimated_file_bytes(model, decisions) - sum(decision.stored_bytes for decision in decisions)
        return held_weights(decisions, rest)

    def rewritten(self, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model with scaled channels, if codes are fitted to them."""
        return scaled_if_fitted(model, statistics, decisions)

    def lower_text(self, model: Model, folder: Path) -> Artifact:
        """Write the tokenizer's files and the part of genai_config.json that it needs."""
        write_text_alone(model, folder)
        return Artifact(self.name, folder, ())

    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        """Write the data file matrix by matrix, then the graph that refers to it, then the companions."""
        floats = NAMED.get(type, type) == FLOAT

        def fill(graph: ir.Graph, file: DataFile) -> None:
            if floats:
                _put_floats(graph, compression.model, matrices, file)
            else:
                _put_integers(graph, compression.model, matrices, file, self._rounding.level)

        fuse_qkv = _factors_alike(compression.decisions)
        return self._write(compression, folder, fill, fuse_qkv, floats and compression.model.decoder.tied)

    def _write(
        self,
        compression: Compression,
        folder: Path,
        fill: Callable[[ir.Graph, DataFile], None],
        fuse_qkv: bool,
        share_embedding: bool,
    ) -> Artifact:
        """Write a decoder and the other files that onnxruntime-genai needs.

        Args:
            compression: What is compressed.
            folder: Output folder; empty.
            fill: Puts the matrices into the skeleton's graph and their data into the file.
            fuse_qkv: Use one matrix multiplication for query, key and value.
            share_embedding: See `build_skeleton`.
        """
        with scratch_folder() as scratch:
            skeleton = build_skeleton(compression.model, scratch, fuse_qkv, share_embedding)
            place = self._data_file(compression.model)
            (folder / place).parent.mkdir(exist_ok=True)
            with replacing(folder / place) as data, data.open("wb") as opened:
                file = DataFile(opened, place, folder)
                fill(skeleton.graph.graph, file)
                move_rest(skeleton.graph.graph, file)
            graph = ir.to_proto(skeleton.graph)
            require_known(graph, place, (folder / place).stat().st_size, folder / MODEL_FILE)
            with replacing(folder / MODEL_FILE) as partial:
                onnx.save_model(graph, str(partial))
            skeleton.write_companions(compression.original, folder, dict(self._rounding.options))
        return Artifact(self.name, folder, (folder / MODEL_FILE, folder / place))

    def _data_file(self, model: Model) -> str:
        """Return the place of the external data below the artifact's folder."""
        return DATA_FILE

    def write_float(self, model: Model, folder: Path) -> Artifact:
        """Write a model in float32: float multiplications, with factors added to their matrices."""
        return lower(self, Compression(model, self.decide(model, FLOAT, "rtn")), FLOAT, folder).artifact

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        """Return a function that decodes a matrix by running ONNX Runtime's own operator on the artifact's bytes."""
        return Tables(artifact.weights[0], declared_by(model.decoder).nodes).decode

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        """Return the format of each matrix as the graph states it."""
        tables = Tables(artifact.weights[0], declared_by(model.decoder).nodes)
        return {group.name: tables.format_name(group) for group in model.groups()}


def _factors_alike(decisions: Mapping[str, Decision]) -> bool:
    """Return whether query, key and value of each layer all have factors or all lack them, and can be fused."""
    found: dict[int | None, set[bool]] = {}
    for decision in decisions.values():
        if decision.group.role in ("q", "k", "v"):
            found.setdefault(decision.group.layer, set()).add(decision.low_rank is not None)
    return all(len(some) == 1 for some in found.values())


def _put_integers(
    graph: ir.Graph, model: Model, matrices: Iterator[CompressedMatrix], file: DataFile, accuracy_level: int
) -> None:
    embedding = model.decoder.embedding
    for product, parts in gathered(products(graph, model.decoder), matrices):
        format = parts[0].decision.format
        assert isinstance(format, MatMulNBitsFormat)
        data = np.concatenate([part.encoded.data for part in parts])
        if product is None:
            table = put_table(graph, file, "model.embed_tokens", format, data, embedding.columns)
        else:
            table = put_matrix(graph, product, format, data, file, accuracy_level)
            factors = [part.encoded.factors for part in parts if part.encoded.factors is not None]
            if factors:
                add_factors(graph, product, factors, file, accuracy_level)
        if parts[0].name == embedding.name:
            put_embedding(graph, format, embedding.rows, embedding.columns, table)


def _put_floats(graph: ir.Graph, model: Model, matrices: Iterator[CompressedMatrix], file: DataFile) -> None:
    for product, parts in gathered(products(graph, model.decoder), matrices):
        values = np.concatenate([part.encoded.planned for part in parts])
        if product is None:
            put_floats(graph, EMBEDDING_WEIGHT, values, file)
        else:
            put_floats(graph, product.weight, np.ascontiguousarray(values.T), file)


TARGET = Onnx()
