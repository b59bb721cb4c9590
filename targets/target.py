"""What a target is, what it makes, and how it is found by name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.compressed import CompressedModel
from exporter.device.profile import DeviceProfile
from exporter.formats.format import Float32, LowRank, WeightFormat
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.errors import RequestError
from exporter.foundation.registry import load
from exporter.model.architecture import Architecture
from exporter.model.model import Model
from exporter.predict.peak_memory import ModelShape, Peak
from exporter.predict.roofline import Throughput
from exporter.targets.artifact import Artifact, target_names


@dataclass(frozen=True)
class AsStored:
    """A model of the same function whose shape a target's files can hold, and how they hold it, for people."""

    model: Model
    how: str


class Target(Protocol):
    """A format that runtimes load.

    A new one is a folder with `target.py` that holds `TARGET`, and with `intake.py` that holds `INTAKE`: what of its
    artifacts is let in from a bundle.

    Attributes:
        name: The target's name.
        default_type: What `--type` is by default.
        default_method: What `--method` is by default.
        type_of_8_bits: The type of symmetric 8-bit codes for every matrix.
        most_rounding_kl: Mean KL, in nats, that the rounding of activations may cost: above it the artifact differs
            from its own weights by more than rounding, and is refused.
        decode_margin: By how much more than its kernels' speeds say a choice of formats may take for a token, over what
            the runtime's own tool makes: as measured of whole models, a share.
        base_formats: Bits of a weight's code -> the usual format of so many; empty where formats have no names by bits.
        factor_formats: Bits of a weight of low-rank factors -> what they are stored in; empty where they cannot be.
    """

    name: str
    default_type: str
    default_method: str
    type_of_8_bits: str
    most_rounding_kl: float
    decode_margin: float
    base_formats: Mapping[int, WeightFormat]
    factor_formats: Mapping[int, WeightFormat]

    def on(self, device: DeviceProfile) -> Self:
        """Return the target with what it decides by the device's instruction set."""

    def types(self) -> list[str]:
        """Return the names that `--type` takes: named mixes and single formats."""

    def carried(self, model: Model) -> AsStored:
        """Return the model as the files can hold its shape; it is what all else is asked for."""

    def decide(self, model: Model, type: str, method: str) -> list[Decision]:
        """Return a decision for each weight group; reads no weights.

        Raises:
            RequestError: the type is unknown, or the target cannot carry this model.
        """

    def storages(self, model: Model) -> list[Storage]:
        """Return what is stored in one format each, and the formats that it may have here."""

    def stock(self, model: Model, most_bytes: int) -> list[Decision]:
        """Return what the runtime's own tool makes, the largest of no more bytes of matrices; empty for none."""

    def throughput(self, group: WeightGroup, format: WeightFormat) -> Throughput:
        """Return how quickly the runtime multiplies with a matrix; infinity where it does not for most tokens."""

    def fixed_bytes(self, model: Model) -> int:
        """Return the most bytes that the model files take besides their matrices."""

    def estimated_file_bytes(self, model: Model, decisions: list[Decision]) -> int:
        """Return the size of the model files that `lower` would write."""

    def estimated_peak(self, model: Model, decisions: list[Decision], context: int) -> Peak:
        """Return the memory of the runtime's process at a context, weights included.

        It is that on the device that `on` was called with; without, on this machine.
        """

    def rewritten(self, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model in the coordinates that suit the target and decisions like these, which compute the same."""

    def lower_text(self, model: Model, folder: Path) -> Artifact | None:
        """Write what the artifact will say of text into an empty folder: for `exporter.targets.text.open_text`.

        Returns:
            An artifact without weights; None where all of it is the source's own, unchanged.

        Raises:
            InputError: the target cannot carry the tokenizer.
        """

    def lower(self, compressed: CompressedModel, type: str, folder: Path) -> Artifact:
        """Write the artifact into an empty folder, matrix by matrix."""

    def lower_float(self, model: Model, folder: Path) -> Artifact:
        """Write a model in float32 into an empty folder: what `lower` writes, but for all that rounds."""

    def read_back(self, artifact: Artifact, model: Model) -> Callable[[WeightGroup], Float32]:
        """Return a function that gives a matrix as the runtime decodes it from the artifact's bytes.

        It returns float32 [rows, columns], rows in the source's order.
        """

    def stored_types(self, artifact: Artifact, model: Model) -> dict[str, str]:
        """Return weight group -> the format that is really in the file."""


def shape_of(architecture: Architecture) -> ModelShape:
    """Return what of a decoder the memory depends on, its widest feed-forward part for all."""
    return ModelShape(
        layers=architecture.layers,
        hidden=architecture.hidden,
        intermediate=max(architecture.intermediate),
        heads=architecture.heads,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        vocab=architecture.vocab,
    )


def load_target(name: str) -> Target:
    """Return a target by name.

    Raises:
        RequestError: there is no such target.
    """
    target: Target = load("exporter.targets.{}.target", name, target_names(), "target").TARGET
    return target


def low_rank(target: Target, rank: int, bits: int) -> LowRank:
    """Return factors of a rank and of so many bits as a target stores them.

    Raises:
        RequestError: the target stores none of so many bits.
    """
    formats = target.factor_formats
    if bits not in formats:
        raise RequestError(
            f"the target {target.name} carries no low-rank factors of {bits} bits",
            expected=", ".join(map(str, formats)) + " bits" if formats else "none: it has a place for matrices only",
            next_step="choose other bits" if formats else "choose another target",
        )
    return LowRank(rank, formats[bits])


def base_format(target: Target, bits: int | None, widths: Collection[int]) -> WeightFormat:
    """Return the target's format of so many bits for matrices of some widths; without bits, that of the fewest.

    Raises:
        RequestError: the target has none, or none that fits the widths.
    """
    fitting = {count: one for count, one in target.base_formats.items() if all(map(one.fits, widths))}
    chosen = min(fitting, default=None) if bits is None else bits
    if chosen is None or chosen not in fitting:
        raise RequestError(
            f"the target {target.name} has no format of {chosen or 'few'} bits for matrices of these widths",
            got=", ".join(map(str, sorted(widths))),
            expected=f"{', '.join(map(str, fitting))} bits" if fitting else "another target",
        )
    return fitting[chosen]
