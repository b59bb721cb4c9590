"""The kinds of steps that a recipe can have.

Rewriting steps come first and give a smaller model. One encoding step then gives every matrix its format. The step
`transport` codes the files that the target has written, and comes last.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Annotated, Self

from pydantic import Field

from exporter.calibrate.layer_stream import Progress
from exporter.calibrate.statistics import Statistics
from exporter.compress.allocate import Storage
from exporter.compress.awq_scaling import Rewritten
from exporter.compress.caldera import ALTERNATION, Alternation
from exporter.compress.effort import Effort
from exporter.compress.method import MatrixMethod, method_kind
from exporter.compress.prune import planned_widths
from exporter.device.profile import DeviceProfile
from exporter.formats.group import Decision
from exporter.foundation.quantities import Document
from exporter.model.decoder import Decoder
from exporter.model.model import Model
from exporter.model.widths import outlined
from exporter.targets.backends import BackendFormats
from exporter.targets.contract import Target, by_bits

# The second moment of a layer's channels, its inverse, and products of them, in double precision.
SQUARES = 5
# Of a weight in a coded file; finer codes of 8 bits have less to gain.
CodedBits = Annotated[float, Field(ge=1, le=6)]
# Gives the statistics of a model on the calibration text, collected when they are asked for.
Observe = Callable[[Model], Statistics]


@dataclass(frozen=True)
class Work:
    """What a rewriting step takes.

    Attributes:
        operations: Multiplications and additions in double precision.
        peak_bytes: Memory.
        observes: It needs statistics of the model that it rewrites.
    """

    operations: float
    peak_bytes: int
    observes: bool


class RewritingStep(Document):
    """A step that gives a smaller model, before matrices get their formats.

    Attributes:
        method: The step's name, that of its file.
    """

    method: str

    @abstractmethod
    def outlined(self, model: Model) -> Model:
        """Return a model of the shape that the step gives, as far as it is known before; reads no weights.

        Raises:
            RequestError: the step cannot be done to this model; what would work is named.
        """

    @abstractmethod
    def rewritten(self, model: Model, observe: Observe, progress: Progress) -> Model:
        """Return the model that the step gives.

        Args:
            model: The source.
            observe: Gives statistics.
            progress: Called with what is done and the total.
        """

    @abstractmethod
    def work(self, model: Model) -> Work:
        """Return what the step takes; reads no weights."""


class PruningStep(RewritingStep):
    """A step that takes feed-forward channels away.

    Attributes:
        ratio: Share of them that goes.
        multiple: Of so many channels a layer keeps a multiple: 32 fits every runtime's blocks, 256 the K types.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    multiple: Annotated[int, Field(ge=1, le=4096)] = 32

    def widths(self, model: Model) -> tuple[int, ...]:
        """Return how many channels each layer keeps, as far as it is known before."""
        return planned_widths(model.decoder, self.ratio, self.multiple)

    def outlined(self, model: Model) -> Model:
        """Return the model with as many channels as will stay, whichever they are."""
        return outlined(model, self.widths(model))


def repair_work(decoder: Decoder) -> Work:
    """Return what the repair of `down` takes, which needs statistics: one system of equations for each layer."""
    operations = sum(2 / 3 * width**3 + 2 * width**2 * decoder.hidden for width in decoder.intermediate)
    return Work(operations, SQUARES * 8 * max(decoder.intermediate) ** 2, True)


@dataclass(frozen=True)
class EncodingTask:
    """What matrices get their formats for.

    Attributes:
        original: The source.
        model: The model to encode: the source, or what the rewriting steps leave of it, in the target's shape.
        device: The device's profile.
        target: The target, on that device.
        backend: The formats that may be chosen for what computes there.
        effort: How much work goes into a smaller loss.
    """

    original: Model
    model: Model
    device: DeviceProfile
    target: Target
    backend: BackendFormats
    effort: Effort


@dataclass(frozen=True)
class Draft:
    """What an encoding step decides before statistics; reads no weights.

    Attributes:
        decisions: One for each weight group, as far as it is known.
        scheme: The formats in words, such as `Q4_K_M` or `at most 79,103,310 bytes`; empty: the recipe's name says it.
        storages: The formats that `decided` chooses from; empty where it has no choice.
        most_file_bytes: The most bytes that the model files may take.
        most_matrix_bytes: The most that all matrices in them may take.
    """

    decisions: list[Decision]
    scheme: str = ""
    storages: Sequence[Storage] = ()
    most_file_bytes: float = inf
    most_matrix_bytes: float = inf

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that `decided` chooses from; empty where it has no choice."""
        return ()

    def with_adapter(self, decisions: list[Decision]) -> Self:
        """Return the draft with these decisions in place of its own, which lack the factors of an adapter."""
        more = sum(one.stored_bytes for one in decisions) - sum(one.stored_bytes for one in self.decisions)
        return replace(self, decisions=decisions, most_matrix_bytes=self.most_matrix_bytes + more)

    def decided(self, given: Rewritten, progress: Progress) -> tuple[list[Decision], tuple[str, ...]]:
        """Return the final decisions, and sentences on what other options would give.

        Args:
            given: The model in the coordinates that it is encoded in, and its statistics on the calibration text.
            progress: Called with matrices done and their total.
        """
        return self.decisions, kept_codes(self.decisions)


def kept_codes(decisions: Sequence[Decision]) -> tuple[str, ...]:
    """Return the sentence that counts the matrices with codes of the source; none if there are none."""
    kept = sum(method_kind(one.method).keeps_codes for one in decisions)
    return (f"{kept} of {len(decisions)} matrices keep the codes of the source",) if kept else ()


class EncodingStep(Document):
    """A step that gives every matrix its format, and its factors if it has any.

    Attributes:
        method: The step's name, that of its file.
    """

    method: str

    @property
    def alternation(self) -> Alternation:
        """How matrices and their factors alternate."""
        return ALTERNATION

    @property
    def chooses_codes_by(self) -> str:
        """What chooses the codes, for people: a method's name, or the step's own."""
        return self.method

    def resolved(self, target: Target) -> Self:
        """Return the step with the target's defaults in place of options that were left open."""
        return self

    @abstractmethod
    def draft(self, task: EncodingTask) -> Draft:
        """Return what is decided before statistics; reads no weights.

        Raises:
            RequestError: the target or the model cannot hold what the step asks for; the error names what would work.
        """

    def coordinates(self, target: Target, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model in the coordinates that it is encoded in: by default those that suit the target."""
        return target.rewritten(model, statistics, decisions)

    def methods(
        self, decisions: Sequence[Decision], given: Rewritten, progress: Progress
    ) -> Mapping[str, MatrixMethod]:
        """Return methods for matrices, by name, in place of the one that decisions name: by default none.

        Args:
            decisions: The final ones.
            given: The model in the coordinates of `coordinates`.
            progress: Called with matrices done and their total.

        Raises:
            RequestError: what the step asks for cannot be had of these weights.
        """
        return {}


class CodedStep(EncodingStep):
    """A step that gives every matrix the target's 8 bits, so coarse that a coded file takes fewer.

    Attributes:
        bits: Of a weight, on average over all matrices, when the file is coded; tables and scales included.
        equalise: Encode in coordinates that suit coding, absorbed by what comes before each matrix.
    """

    bits: CodedBits
    equalise: bool = True

    def draft(self, task: EncodingTask) -> Draft:
        """Return the target's 8 bits for every matrix."""
        reason = f"{self.method} by the recipe: {self.bits:g} bits a weight on average when coded"
        decisions = task.target.decide(task.model, by_bits(task.target).type_of_8_bits, self.method)
        return Draft([replace(one, method=self.method, reason=reason) for one in decisions])

    def coordinates(self, target: Target, model: Model, statistics: Statistics, decisions: list[Decision]) -> Rewritten:
        """Return the model in coordinates that suit coding, or as the target has it."""
        if self.equalise:
            return self.suited(model, statistics)
        return super().coordinates(target, model, statistics, decisions)

    @abstractmethod
    def suited(self, model: Model, statistics: Statistics) -> Rewritten:
        """Return the model in coordinates that suit coding."""
