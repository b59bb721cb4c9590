"""The interface of targets, and how a target is found by name."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.compression import CompressedMatrix, Compression, MatrixOutcome, compress
from exporter.compress.method import AS_STORED
from exporter.device.profile import DeviceProfile
from exporter.formats.format import Float32, LowRank, WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.foundation.registry import load
from exporter.model.decoder import Decoder
from exporter.model.family import Family
from exporter.model.lora import MERGE_INSTEAD
from exporter.model.model import Model
from exporter.predict.peak_memory import ModelShape, Peak, Weights
from exporter.predict.roofline import Cpu, Throughput, cpu_of
from exporter.targets.artifact import Artifact, target_names
from exporter.targets.facts import sampling_targets

# In nats. Float32 sums in another order give 1e-13 to 1e-8, a forgotten scaling of positions 1e-1.
MOST_LOWERING_KL = 1e-6


@dataclass(frozen=True)
class AsStored:
    """An equivalent model whose shape a target's files can hold; `how` tells the user how they hold it."""

    model: Model
    how: str


@runtime_checkable
class Target(Protocol):
    """A format that runtimes load.

    A new target is a folder with `target.py`, which exports `TARGET`, an object of a class derived from this one. It
    also exports `RUNTIME`, `TEXT`, `INTAKE` and `FACTS` (`exporter.targets.runtime`, `.text`, `.intake`, `.facts`),
    unless `runtime.py`, `text.py`, `intake.py` and `target.toml` hold them, so that they load without the libraries
    that write artifacts. What it need not have is in `Budgeted`, `FormatsByBits`,
    `exporter.targets.emulated`, `.judge`, `.npu`, `.memory`, `.coded_layout` and `.sources`, and in `coded.py`
    (`CodedRuntime`).

    Attributes:
        name: The target's name.
        default_type: Default of `--type`.
        default_method: Default of `--method`.
        most_rounding_kl: Largest mean KL, in nats, that rounding of activations may cost. Above it, the artifact
            differs from its own weights by more than rounding and is refused.
        states_rounding: The files say how activations are rounded. Accuracy is that of this arithmetic; what the
            runtime rounds beyond it by default is measured too, and reported apart.
    """

    name: str
    default_type: str
    default_method: str
    most_rounding_kl: float
    states_rounding: bool = False

    def most_lowering_kl(self, family: Family) -> float:
        """Return the largest mean KL, in nats, of a float32 artifact against its model: of sums in another order."""
        return MOST_LOWERING_KL

    @abstractmethod
    def types(self) -> list[str]:
        """Return the names accepted by `--type`: named mixes and single formats."""

    @abstractmethod
    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        """Return a decision for each weight group; reads no weights.

        Raises:
            RequestError: the type is unknown, or the target does not support this model.
        """

    @abstractmethod
    def write(
        self, compression: Compression, matrices: Iterator[CompressedMatrix], type: str, folder: Path
    ) -> Artifact:
        """Write the artifact into an empty folder.

        Args:
            compression: What is compressed; it tells the shapes and formats of all matrices.
            matrices: The matrices, in the order of the decoder's computation.
            type: The name of the type, or the description of a budget, for the file's own metadata.
            folder: The folder.
        """

    @abstractmethod
    def write_float(self, model: Model, folder: Path) -> Artifact:
        """Write a model in float32 into an empty folder, as `write` does but without rounding."""

    @abstractmethod
    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        """Return a function that decodes a matrix from the artifact's bytes as the runtime does.

        The function returns float32 [rows, columns], rows in the source's order.
        """

    @abstractmethod
    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        """Return weight group -> the format found in the file."""

    def limits_context(self, family: Family) -> str | None:
        """Return what of a model of the family limits the target's context besides what limits it in every target."""
        return None

    def lacks(self, family: Family) -> str | None:
        """Return why the target builds no model of a family; None if it does."""
        return None

    def on(self, device: DeviceProfile) -> Self:
        """Return the target with the choices that depend on the device's instruction set; by default there are none."""
        return self

    def processor(self, device: DeviceProfile) -> Cpu:
        """Return the CPU of a device to which speeds are relative; by default what the profile's facts say of it."""
        return cpu_of(device)

    def context_length(self, model: Model) -> int:
        """Return the number of positions for which the runtime computes what the model does."""
        return model.decoder.context_length

    def as_stored(self, model: Model) -> AsStored:
        """Return the model in a shape that the files can hold; the other methods refuse or expect this model."""
        return AsStored(model, "every layer has its own shapes")

    def rewritten(self, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return an equivalent model in the coordinates that suit the target and decisions like these."""
        return Rewritten(model, statistics)

    def alternatives(self, group: WeightGroup) -> Sequence[WeightFormat]:
        """Return the formats that `reconsidered` may give a matrix; by default there are none."""
        return ()

    def reconsidered(self, given: Rewritten, decisions: list[Decision]) -> list[Decision]:
        """Return the decisions with other formats, of `alternatives`, where what was observed asks for them.

        Args:
            given: The model in the coordinates of `rewritten`, and its statistics on the calibration text.
            decisions: The decisions so far.
        """
        return decisions

    def adapter_format(self, model: Model, group: WeightGroup) -> WeightFormat | None:
        """Return the format of factors of an adapter beside a matrix; None if the files have no place for them."""
        return None

    def adapter_bytes(self, model: Model) -> int:
        """Return the most bytes that the file of an adapter takes that a model keeps beside its base; 0 without one."""
        return 0

    def lower_text(self, model: Model, folder: Path) -> Artifact | None:
        """Write the artifact's tokenizer and chat template into an empty folder, for `open_text`.

        Returns:
            An artifact without weights; None if the source's tokenizer and template are kept unchanged.

        Raises:
            InputError: the target does not support the tokenizer.
        """
        return None

    def estimated_file_bytes(self, model: Model, decisions: list[Decision]) -> int:
        """Return the size of the model files that `write` would write; by default that of the matrices."""
        return sum(decision.stored_bytes for decision in decisions)

    def estimated_peak(self, model: Model, decisions: list[Decision], context: int) -> Peak:
        """Return the memory of the runtime's process at a context, weights included.

        By default, the files are held once, with keys and values in float32. The device is the one given to `on`;
        without one, this machine.
        """
        held = self.estimated_file_bytes(model, decisions)
        return Peak(0, Weights(held, held), shape_of(model.decoder).cache_bytes(context, 4), 0)


@runtime_checkable
class Budgeted(Target, Protocol):
    """A target that can choose formats within limits of bytes and time.

    Attributes:
        decode_margin: How much longer than predicted from kernel speeds a choice of formats may take per token,
            relative to the runtime's stock mix; a share, measured on whole models.
    """

    decode_margin: float

    @abstractmethod
    def storages(self, model: Model) -> list[Storage]:
        """Return the units that are stored in one format each, with the formats that each may have."""

    @abstractmethod
    def stock(self, model: Model, most_bytes: int) -> list[Decision]:
        """Return the largest mix of the runtime's own tool within `most_bytes` of matrices; empty if there is none."""

    @abstractmethod
    def throughput(self, group: WeightGroup, format: WeightFormat) -> Throughput:
        """Return the runtime's speed with a matrix; infinite where most tokens skip the multiplication."""

    @abstractmethod
    def fixed_bytes(self, model: Model) -> int:
        """Return the most bytes that the model files take in addition to their matrices."""


@runtime_checkable
class FormatsByBits(Target, Protocol):
    """A target whose formats recipes may ask for by their bits.

    Attributes:
        type_of_8_bits: The type of symmetric 8-bit codes for every matrix.
        base_formats: Bits per weight -> the usual format of that size; empty where formats have no names by bits.
        factor_formats: Bits per weight of low-rank factors -> their format; empty if factors cannot be stored.
    """

    type_of_8_bits: str
    base_formats: Mapping[int, WeightFormat]
    factor_formats: Mapping[int, WeightFormat]


def shape_of(decoder: Decoder) -> ModelShape:
    """Return the dimensions that determine a decoder's memory; all layers get the widest feed-forward width."""
    return ModelShape(
        attention_layers=decoder.attention_layers,
        hidden=decoder.hidden,
        intermediate=max(decoder.intermediate),
        heads=decoder.heads,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        vocab=decoder.vocab,
        keys=decoder.key_channels,
    )


@dataclass(frozen=True)
class Lowered:
    """An artifact, and how it came about.

    Attributes:
        compression: What was compressed, and how.
        artifact: The artifact.
        outcomes: The outcome of each matrix, by name.
    """

    compression: Compression
    artifact: Artifact
    outcomes: Mapping[str, MatrixOutcome]


def lower(
    target: Target,
    compression: Compression,
    type: str,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Lowered:
    """Compress a model and write the artifact, matrix by matrix.

    Args:
        target: The target.
        compression: What is compressed, and how.
        type: See `Target.write`.
        folder: An empty folder.
        progress: Called after each matrix with the number of those done and the total.
    """
    outcomes: dict[str, MatrixOutcome] = {}

    def matrices() -> Iterator[CompressedMatrix]:
        for matrix in compress(compression, progress):
            outcomes[matrix.name] = matrix.outcome
            yield matrix

    return Lowered(compression, target.write(compression, matrices(), type, folder), outcomes)


def load_target(name: str) -> Target:
    """Return a target by name.

    Raises:
        RequestError: there is no such target.
    """
    target: Target = load("exporter.targets.{}.target", name, target_names(), "target").TARGET
    return target


def sampling_target() -> FormatsByBits:
    """Return the target in whose runtime a model writes its own text."""
    return by_bits(load_target(sampling_targets()[0]))


def budgeted(target: Target) -> Budgeted:
    """Return a target as one that chooses formats within limits.

    Raises:
        RequestError: it is none.
    """
    if isinstance(target, Budgeted):
        return target
    raise _lacking(target, "has no budgets")


def by_bits(target: Target) -> FormatsByBits:
    """Return a target as one whose formats have names by bits.

    Raises:
        RequestError: it is none.
    """
    if isinstance(target, FormatsByBits):
        return target
    raise _lacking(target, "names no formats by their bits")


def _lacking(target: Target, what: str) -> RequestError:
    return RequestError(
        f"the target {target.name} {what}", expected="a type for all matrices",
        next_step=f"name one with --type, such as {target.default_type}, or choose another target",
    )  # fmt: skip


def with_codes(model: Model, decisions: list[Decision]) -> list[Decision]:
    """Return decisions that take the codes of the source where their formats hold them."""
    return [
        replace(one, method=AS_STORED, reason=f"{one.reason}; the codes of the source")
        if model.has_codes(one.group.name, one.format)
        else one
        for one in decisions
    ]


def with_adapter(target: Target, model: Model, decisions: list[Decision]) -> list[Decision]:
    """Return decisions with the factors of the adapter that a model has beside it, where they lack them.

    Raises:
        RequestError: the target has no place for them, or matrices have other factors.
    """
    ranks, changed = model.ranks(), []
    for one in decisions:
        rank = ranks.get(one.group.name)
        if one.low_rank is not None and ranks:
            raise RequestError(
                "low-rank factors and an adapter cannot both be kept beside the matrices", where=one.group.name,
                next_step=f"choose a recipe without factors, or {MERGE_INSTEAD}",
            )  # fmt: skip
        if rank is None or one.adapter is not None:
            changed.append(one)
            continue
        format = target.adapter_format(model, one.group)
        if format is None:
            raise RequestError(
                f"the target {target.name} cannot keep factors of an adapter beside this matrix", where=one.group.name,
                expected="matrices that a file of the target gguf holds one by one", next_step=MERGE_INSTEAD,
            )  # fmt: skip
        adapter = LowRank(rank, format)
        changed.append(
            replace(one, adapter=adapter, reason=f"{one.reason}; an adapter's factors {adapter.name} beside it")
        )
    return changed


def low_rank(target: Target, rank: int, bits: int) -> LowRank:
    """Return low-rank factors of a rank and a number of bits as a target stores them.

    Raises:
        RequestError: the target stores no factors of that many bits.
    """
    formats = by_bits(target).factor_formats
    if bits not in formats:
        raise RequestError(
            f"the target {target.name} carries no low-rank factors of {bits} bits",
            expected=", ".join(map(str, formats)) + " bits" if formats else "none: it has a place for matrices only",
            next_step="choose other bits" if formats else "choose another target",
        )
    return LowRank(rank, formats[bits])


def base_format(target: Target, bits: int | None, widths: Collection[int]) -> WeightFormat:
    """Return the target's format of so many bits for matrices of some widths; without bits, the one with the fewest.

    Raises:
        RequestError: the target has no such format, or none that fits the widths.
    """
    formats = by_bits(target).base_formats
    fitting = {count: one for count, one in formats.items() if all(map(one.fits, widths))}
    chosen = min(fitting, default=None) if bits is None else bits
    if chosen is None or chosen not in fitting:
        raise RequestError(
            f"the target {target.name} has no format of {chosen or 'few'} bits for matrices of these widths",
            got=", ".join(map(str, sorted(widths))),
            expected=f"{', '.join(map(str, fitting))} bits" if fitting else "another target",
        )
    return fitting[chosen]
