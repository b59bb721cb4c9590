"""The target `gguf`: one file for llama.cpp and Ollama."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Self

import gguf
import numpy as np

from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten, scaled_if_fitted
from exporter.compress.checks import check_formats
from exporter.compress.compression import CompressedMatrix, Compression
from exporter.compress.method import AS_STORED
from exporter.device.backend import TimedKernels
from exporter.device.profile import DeviceProfile
from exporter.formats.format import Bytes, Float32, WeightFormat, plus
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.cache import replacing, scratch_folder
from exporter.foundation.errors import InputError, RequestError, did_you_mean
from exporter.foundation.fitted import fitted_value
from exporter.model.blocks import Vector
from exporter.model.decoder import TOKENS
from exporter.model.ends import special_ids
from exporter.model.family import Family
from exporter.model.gguf_ends import KEY, ends_written
from exporter.model.gguf_names import (
    first_rows,
    gguf_matrices,
    gguf_names,
    gguf_shape,
    gguf_vectors,
    in_source_order,
    row_order,
)
from exporter.model.gguf_reader import open_gguf
from exporter.model.model import Model
from exporter.model.widths import padded
from exporter.predict.peak_memory import Peak, host_features
from exporter.predict.roofline import Cpu, Throughput, timed_throughputs
from exporter.targets.artifact import Artifact
from exporter.targets.contract import AsStored, Target, lower, shape_of, with_adapter, with_codes
from exporter.targets.gguf.adapter import Adapter, AdapterWriter
from exporter.targets.gguf.adapter_text import adapter_text
from exporter.targets.gguf.feed_forward_widths import feed_forward_storage
from exporter.targets.gguf.formats.ggml import GgmlFormat, decoded, ggml_format, ggml_formats
from exporter.targets.gguf.header import finish_header, frequency_factors, write_header
from exporter.targets.gguf.memory import held_weights, process_peak
from exporter.targets.gguf.mixes import MIXES, mix_types
from exporter.targets.gguf.modelfile import MODELFILE, modelfile
from exporter.targets.gguf.pretokenizer import write_vocabulary
from exporter.targets.gguf.session import ADAPTER_FILE
from exporter.targets.gguf.supported import require_supported
from exporter.targets.gguf.vocabulary import copy_vocabulary
from exporter.targets.kernel_speeds import speeds_on

MODEL_FILE = "model.gguf"
# For llama.cpp's own tools, which read no chat template from an adapter.
TEMPLATE_FILE = "chat_template.jinja"


# The types from which `storages` chooses: those that llama.cpp computes quickly, from 2 to 8 bits.
ALPHABET = (
    "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1",
    "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip

# The types whose kernels are timed on a device, and the one to whose speed with many tokens theirs are relative.
REFERENCE = "Q4_0"
TIMED = (*ALPHABET, "F16", "F32")

# What chooses experts is kept as it is, as llama.cpp's own tool does.
EXACT, KEPT = ggml_format("F32"), "kept in F32, since it chooses the experts"

# From the largest to the smallest.
USUAL_MIXES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS", "IQ3_XXS", "Q2_K", "IQ2_M")


class Gguf(Target):
    """One GGUF file with tensors in any of llama.cpp's types, and a Modelfile for Ollama."""

    name = "gguf"
    default_type = "Q4_K_M"
    default_method = "ldlq"
    type_of_8_bits = "Q8_0"
    most_rounding_kl = 0.1
    decode_margin = fitted_value("exporter.targets.gguf", "decode_margin")
    base_formats: Mapping[int, WeightFormat] = MappingProxyType(
        {
            bits: ggml_format(name)
            for bits, name in {2: "Q2_K", 3: "Q3_K", 4: "Q4_0", 5: "Q5_0", 6: "Q6_K", 8: "Q8_0"}.items()
        }
    )
    # 32-wide types, so that a rank only has to be a multiple of 32.
    factor_formats: Mapping[int, WeightFormat] = MappingProxyType(
        {4: ggml_format("Q4_0"), 8: ggml_format("Q8_0"), 16: ggml_format("F16")}
    )

    def __init__(self, features: Collection[str] | None = None, timed: TimedKernels | None = None) -> None:
        self._features = host_features() if features is None else features
        self._cpu: Cpu | None = None
        self._speeds = speeds_on("exporter.targets.gguf", self._features)
        if timed is not None:
            _require_all_timed(timed)
            self._cpu, self._speeds = timed_throughputs(timed, REFERENCE)

    def most_lowering_kl(self, family: Family) -> float:
        """Return what a family declares where llama.cpp's own rounding exceeds that of sums in another order."""
        return family.gguf.most_lowering_kl or super().most_lowering_kl(family)

    def on(self, device: DeviceProfile) -> Self:
        """Return the target with llama.cpp's kernels for a device: as timed there, or for its instruction set.

        Raises:
            InputError: not all types were timed.
        """
        return type(self)(device.isa.features, device.timed_kernels(self.name))

    def types(self) -> list[str]:
        """Return the named mixes, the single types, and the types that a GGUF source has."""
        return [*MIXES, *(name for name in ggml_formats() if name not in MIXES), AS_STORED]

    def as_stored(self, model: Model) -> AsStored:
        """Return the model, padded with zero channels if its layers have several widths and the file only one."""
        require_supported(model)
        way = feed_forward_storage(model.decoder)
        return AsStored(padded(model) if way.padded else model, way.reason)

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        """Return a decision for each matrix: llama.cpp's own for a named mix, else the type wherever it fits."""
        require_supported(model)
        way = feed_forward_storage(model.decoder)
        if way.padded:
            raise RequestError(
                "the feed-forward widths of the layers differ, which the file cannot hold", got=way.reason,
                next_step="use the model that `as_stored` returns, or prune all layers alike",
            )  # fmt: skip
        if type not in self.types():
            raise RequestError(f"unknown GGUF type {type!r}", next_step=did_you_mean(type, self.types()))
        if type == AS_STORED:
            decisions = self._as_stored(model)
        else:
            decisions = self._mixed(model, type, method) if type in MIXES else self._single(model, type, method)
            decisions = with_codes(model, decisions)
        check_formats(decisions, map(ggml_format, (*reversed(ALPHABET), "F16")))
        return decisions

    def _as_stored(self, model: Model) -> list[Decision]:
        decisions = []
        for group in model.groups():
            type = model.stored_type(group.name)
            if type is None:
                raise RequestError(
                    "the source holds no codes", where=group.name, expected=f"a GGUF file for the type {AS_STORED}",
                    next_step="choose another type",
                )  # fmt: skip
            decisions.append(Decision(group, AS_STORED, ggml_format(type), "the type and the codes of the source"))
        return decisions

    def _mixed(self, model: Model, mix: str, method: str) -> list[Decision]:
        names = gguf_names(model.decoder)
        groups = model.groups()
        observed = [names[group.name] for group in groups if group.site != TOKENS]
        types = mix_types(mix, model.decoder, model.config, observed)
        usual = max(set(types.values()), key=list(types.values()).count)
        return [_mix_decision(group, method, types[names[group.name]], mix, usual) for group in groups]

    def _single(self, model: Model, type: str, method: str) -> list[Decision]:
        wanted = ggml_format(type), f"{type} for every matrix"
        return [Decision(group, method, *((EXACT, KEPT) if group.exact else wanted)) for group in model.groups()]

    def storages(self, model: Model) -> list[Storage]:
        """Return the matrices of each tensor; types that need importance are offered where inputs were observed."""
        alphabet = [ggml_format(name) for name in ALPHABET]

        def formats(group: WeightGroup) -> tuple[GgmlFormat, ...]:
            if group.exact:
                return (EXACT,)
            observed = group.site != TOKENS
            return tuple(f for f in alphabet if f.fits(group.columns) and (observed or not f.needs_importance))

        return [Storage(groups, formats(groups[0])) for groups in gguf_matrices(model.decoder).values()]

    def stock(self, model: Model, most_bytes: int) -> list[Decision]:
        """Return the largest of llama.cpp's usual mixes within that size."""
        for mix in USUAL_MIXES:
            decisions = self._mixed(model, mix, "rtn")
            if sum(decision.stored_bytes for decision in decisions) <= most_bytes:
                return decisions
        return []

    def throughput(self, group: WeightGroup, format: WeightFormat) -> Throughput:
        """Return the speed of a type's kernels; only the last token of a prompt goes through the head."""
        known = self._speeds[format.name]
        return replace(known, prefill=math.inf) if group.layer is None else known

    def processor(self, device: DeviceProfile) -> Cpu:
        """Return the timed CPU, or else what the profile's facts say of it."""
        return self._cpu or super().processor(device)

    def fixed_bytes(self, model: Model) -> int:
        """Return the size of the file without its matrices, plus the most that their alignment takes."""
        vectors = {name: math.prod(vector.shape) for name, vector in gguf_vectors(model.decoder).items()}
        vectors |= {
            name: values.size for name, values in frequency_factors(model.config, model.decoder.rotary_width).items()
        }
        tensors = [*vectors, *gguf_matrices(model.decoder)]
        with scratch_folder() as scratch:
            path = scratch / "empty.gguf"
            with closing(gguf.GGUFWriter(path, feed_forward_storage(model.decoder).architecture)) as writer:
                _add_metadata(writer, model, "")
                for name in tensors:
                    writer.add_tensor_info(name, (32, 32), np.dtype(np.float32), 4096)
                finish_header(writer)
            header = path.stat().st_size
        return header + 4 * sum(vectors.values()) + len(tensors) * gguf.GGUF_DEFAULT_ALIGNMENT

    def estimated_file_bytes(self, model: Model, decisions: list[Decision]) -> int:
        """Return the size of tensors, vocabulary and header; the vocabulary is estimated from the tokenizer's files."""
        vectors = sum(4 * int(np.prod(shape)) for shape in model.decoder.vectors().values())
        tokenizer = model.folder / "tokenizer.json"
        text = tokenizer.stat().st_size if tokenizer.is_file() else 16 * model.decoder.vocab
        # tokenizer.json holds each token and each merge about once, with JSON around them.
        return sum(decision.stored_bytes for decision in decisions) + vectors + text // 2

    def estimated_peak(self, model: Model, decisions: list[Decision], context: int) -> Peak:
        """Return the memory of llama.cpp's process."""
        file_bytes = self.estimated_file_bytes(model, decisions)
        weights = held_weights(decisions, file_bytes, self._features)
        return process_peak(shape_of(model.decoder), weights, context)

    def adapter_format(self, model: Model, group: WeightGroup) -> WeightFormat | None:
        """Return F32 for a matrix that is a tensor by itself and is multiplied by."""
        alone = len(gguf_matrices(model.decoder)[gguf_names(model.decoder)[group.name]]) == 1
        return EXACT if alone and "embedding" not in group.uses else None

    def adapter_bytes(self, model: Model) -> int:
        """Return the size of the adapter's file, plus the most that the alignment of its tensors takes."""
        if model.base is None:
            return 0
        decided = with_adapter(self, model.base, self._single(model.base, "F32", "rtn"))
        decisions = [one for one in decided if one.adapter is not None]
        with scratch_folder() as scratch:
            path = scratch / ADAPTER_FILE
            AdapterWriter(path, model.decoder, model.name, decisions, adapter_text(model)).close()
            header = path.stat().st_size
        factors = sum(one.stored_bytes - one.base_bytes for one in decisions)
        return header + factors + 2 * len(decisions) * gguf.GGUF_DEFAULT_ALIGNMENT

    def rewritten(self, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model with scaled channels, if codes are fitted to them."""
        return scaled_if_fitted(model, statistics, decisions)

    def lower_text(self, model: Model, folder: Path) -> Artifact | None:
        """Write only the vocabulary; return None for a GGUF source, whose vocabulary is copied and needs no check."""
        if model.single_file:
            return None
        path, base = folder / MODEL_FILE, model.base or model
        with closing(gguf.GGUFWriter(path, feed_forward_storage(model.decoder).architecture)) as writer:
            write_vocabulary(writer, base.folder, model.decoder.vocab, base.name)
            finish_header(writer)
        if model.base is None:
            return Artifact(self.name, folder, (path,))
        AdapterWriter(folder / ADAPTER_FILE, model.decoder, model.name, [], adapter_text(model)).close()
        return Artifact(self.name, folder, (path, folder / ADAPTER_FILE))

    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        """Write the GGUF file tensor by tensor, with the adapter if there are factors, then the Modelfile."""
        with_factors = [one for one in compression.decided if one.beside is not None]
        model, original = compression.model, compression.original
        with ExitStack() as opened:
            adapter = None
            if with_factors:
                text = None if original.base is None else adapter_text(original)
                partial = opened.enter_context(replacing(folder / ADAPTER_FILE))
                writer = AdapterWriter(partial, model.decoder, original.name, with_factors, text)
                adapter = opened.enter_context(closing(writer))
                if text is not None and text.template is not None:
                    (folder / TEMPLATE_FILE).write_text(text.template, encoding="utf-8")
            path = opened.enter_context(replacing(folder / MODEL_FILE))
            _write_gguf(path, compression, matrices, type, adapter)
        files = [MODEL_FILE, *([ADAPTER_FILE] if with_factors else [])]
        (folder / MODELFILE).write_text(modelfile(files), encoding="utf-8")
        return Artifact(self.name, folder, tuple(folder / file for file in files))

    def write_float(self, model: Model, folder: Path) -> Artifact:
        """Write a model in float32: matrices in F32, an adapter beside them if the model has one."""
        decisions = with_adapter(self, model, self.decide(model, "F32", "rtn"))
        return lower(self, Compression(model, decisions), "F32", folder).artifact

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        """Return a function that decodes a matrix from the files with ggml's own `to_float`, including its factors."""
        tensors = {tensor.name: tensor for tensor in open_gguf(_model_file(artifact)).tensors}
        names, first = gguf_names(model.decoder), first_rows(model.decoder)
        adapter = _adapter(artifact, model)

        def read(group: WeightGroup) -> Float32:
            stored = decoded(tensors[names[group.name]], first[group.name], group.rows)
            order = row_order(model.decoder, group)
            factors = adapter.decode(group)
            if factors is None:
                return in_source_order(stored, order)
            left, right = factors
            return plus(in_source_order(stored, order), in_source_order(left, order), right)

        return read

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        """Return the type of each matrix as the file states it."""
        types = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(_model_file(artifact)).tensors}
        names = gguf_names(model.decoder)
        adapter = _adapter(artifact, model)
        return {
            group.name: types[names[group.name]] + (f"+{low_rank.name}" if low_rank else "")
            for group in model.groups()
            for low_rank in [adapter.low_rank(group)]
        }


def _require_all_timed(timed: TimedKernels) -> None:
    missing = [type for type in TIMED if type not in timed.speeds]
    if missing:
        raise InputError(
            "the profile's timed kernels lack types", where="timed_kernels of the target gguf", got=", ".join(missing),
            expected="the speed of every type from which formats are chosen",
            next_step="time them again with edge-exporter bench --kernels --profile",
        )  # fmt: skip


def _mix_decision(group: WeightGroup, method: str, type: str, mix: str, usual: str) -> Decision:
    format = ggml_format(type)
    reason = f"{mix} as llama_model_quantize makes it"
    if group.columns % 256 and type in FALLBACKS:
        reason += f"; a width of {group.columns} is no multiple of 256, so llama.cpp falls back to {type}"
    elif type != usual:
        reason += f"; {type} where most matrices have {usual}"
    return Decision(group, method, format, reason)


# llama.cpp's replacements for a K or IQ type whose blocks of 256 do not fit.
FALLBACKS = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16")


def _model_file(artifact: Artifact) -> Path:
    return next(path for path in artifact.weights if path.name != ADAPTER_FILE)


def _adapter(artifact: Artifact, model: Model) -> Adapter:
    return Adapter(next((path for path in artifact.weights if path.name == ADAPTER_FILE), None), model)


def _write_gguf(
    path: Path,
    compression: Compression,
    matrices: Iterator[CompressedMatrix],
    type: str,
    adapter: AdapterWriter | None,
) -> None:
    model = compression.model
    vectors = {name: _stored_vector(model, vector) for name, vector in gguf_vectors(model.decoder).items()}
    vectors |= frequency_factors(model.config, model.decoder.rotary_width)
    tensors = gguf_matrices(model.decoder)
    decisions = {decision.group.name: decision for decision in compression.decided}
    with closing(gguf.GGUFWriter(path, feed_forward_storage(model.decoder).architecture)) as writer:
        _add_metadata(writer, model, type)
        for name, vector in vectors.items():
            writer.add_tensor_info(name, vector.shape, vector.dtype, vector.nbytes)
        for name, groups in tensors.items():
            _add_matrices(writer, name, [decisions[group.name] for group in groups])
        finish_header(writer)
        for vector in vectors.values():
            writer.write_tensor_data(vector)
        for data in _in_order(tensors, ((one.name, _stored_rows(model, one, adapter)) for one in matrices)):
            writer.write_tensor_data(data)


def _in_order(tensors: Mapping[str, Sequence[WeightGroup]], matrices: Iterable[tuple[str, Bytes]]) -> Iterator[Bytes]:
    """Yield the data of each tensor in turn, as soon as all of its matrices have come."""
    waiting = dict[str, Bytes]()
    for groups in tensors.values():
        while any(group.name not in waiting for group in groups):
            name, rows = next(iter(matrices))
            waiting[name] = rows
        parts = [waiting.pop(group.name) for group in groups]
        yield np.concatenate(parts) if len(parts) > 1 else parts[0]


def _add_matrices(writer: gguf.GGUFWriter, name: str, decisions: Sequence[Decision]) -> None:
    """Announce a tensor that holds the rows of one or more matrices.

    Raises:
        RequestError: they were decided on differently, or one has factors.
    """
    one = decisions[0]
    kinds = {decision.format.name + (" with factors" if decision.beside else "") for decision in decisions}
    if len(decisions) > 1 and kinds != {one.format.name}:
        roles = ", ".join(dict.fromkeys(decision.group.role for decision in decisions))
        raise RequestError(
            f"llama.cpp has one tensor for {roles}", where=name, got=" and ".join(sorted(kinds)),
            expected="one type for all, and no factors",
            next_step="give these roles the same type, and leave them out of low-rank steps",
        )  # fmt: skip
    row = one.format.stored_bytes(1, one.group.columns)
    stacked = one.group.expert is not None
    rows = (len(decisions), one.group.rows) if stacked else (sum(decision.group.rows for decision in decisions),)
    kind = gguf.GGMLQuantizationType[one.format.name]
    size = sum(decision.base_bytes for decision in decisions)
    writer.add_tensor_info(name, (*rows, row), np.dtype(np.uint8), size, kind)


def _stored_rows(model: Model, matrix: CompressedMatrix, adapter: AdapterWriter | None) -> Bytes:
    """Return a matrix's rows in the file's order; its factors are added to the adapter."""
    order = row_order(model.decoder, matrix.decision.group)
    data, factors = matrix.encoded.data, matrix.factors
    if adapter is not None and factors is not None:
        adapter.add(factors, order)
    return data if order is None else data[order]


def _stored_vector(model: Model, vector: Vector) -> Float32:
    """Return what a file holds of a vector: for a norm its gain, offset included."""
    given = model.read(vector.name).reshape(gguf_shape(vector))
    return given + np.float32(vector.offset) if vector.offset else given


def _add_metadata(writer: gguf.GGUFWriter, model: Model, type: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if hasattr(gguf.LlamaFileType, f"MOSTLY_{type}"):
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type}"])
    write_header(writer, model.decoder, model.config)
    if model.single_file:
        copy_vocabulary(writer, model.single_file, model.name)
        ends: Sequence[int] = special_ids(model.folder, {}, model.decoder.vocab).ends
    else:
        ends = write_vocabulary(writer, model.folder, model.decoder.vocab, model.name).ends
    writer.add_string(KEY, ends_written(ends))


TARGET = Gguf()
