"""A compressed model: decisions, and the encoded matrices that follow from them, made one at a time."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from exporter.calibrate.moments import Site
from exporter.calibrate.ranges import ChannelRanges
from exporter.calibrate.statistics import Statistics
from exporter.compress.method import Method, load_method, relative_error
from exporter.effort import EFFORTS, Effort
from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.weights.format import EncodedMatrix, Float32
from exporter.weights.group import Decision


@dataclass(frozen=True)
class Outcome:
    """What became of one matrix.

    Attributes:
        planned_sha256: SHA-256 of the planned weights, float32, rows in the source's order.
        output_error: Relative squared error of the outputs on the calibration text (of the weights where the
            inputs were not observed).
    """

    planned_sha256: str
    output_error: float


class CompressedModel:
    """The matrices of a model in the formats decided on; each is encoded when the target asks for it.

    Args:
        model: The source.
        decisions: One for each weight group.
        statistics: What was seen of the inputs; None where no method and no format needs them.
        effort: How much work the methods do.
        encoded: Called after each matrix with its number and the total.
        rewritten: The source in the coordinates that it is compressed in, which the statistics are of; None for its
            own.
        methods: Methods of single matrices, by name, instead of the one that the decision names.
    """

    def __init__(
        self,
        model: Model,
        decisions: list[Decision],
        statistics: Statistics | None,
        effort: Effort = EFFORTS["balanced"],
        encoded: Callable[[int, int], None] = lambda done, total: None,
        rewritten: Model | None = None,
        methods: Mapping[str, Method] = MappingProxyType({}),
    ) -> None:
        self.model = model
        self.rewritten = rewritten or model
        self.decisions = {decision.group.name: decision for decision in decisions}
        self.outcomes: dict[str, Outcome] = {}
        self._statistics = statistics
        self._methods = {name: load_method(name, effort) for name in {one.method for one in decisions}}
        self._own_methods = methods
        self._encoded = encoded

    def encode(self, name: str) -> EncodedMatrix:
        """Read, compress and return one matrix; its outcome is kept.

        Raises:
            InputError: the matrix holds NaN or infinity.
            RequestError: its weights are so small that the format makes every one of them zero.
        """
        decision = self.decisions[name]
        weight = self.rewritten.read(name)
        site = self._site(decision)
        method = self._own_methods.get(name, self._methods[decision.method])
        matrix = method.encode(weight, decision.format, site)
        if weight.any() and not matrix.planned.any():
            raise RequestError(
                f"{decision.format.name} makes every weight zero",
                where=name,
                got=f"weights of at most {np.abs(weight).max():.3g}",
                next_step="choose a type that holds float32, such as F32, or for ONNX int4-b32-f32",
            )
        second_moment = None if site is None else site.second_moment
        self.outcomes[name] = Outcome(
            weights_digest(matrix.planned), relative_error(weight, matrix.planned, second_moment)
        )
        self._encoded(len(self.outcomes), len(self.decisions))
        return matrix

    def vector(self, name: str) -> Float32:
        """Return a norm or bias, which stays as it is."""
        return self.rewritten.read(name)

    def ranges(self, place: str) -> ChannelRanges:
        """Return the ranges of the channels of a place; see `exporter.calibrate.statistics`.

        Raises:
            RequestError: they were not observed.
        """
        found = None if self._statistics is None else self._statistics.ranges(place)
        if found is None:
            raise RequestError("the ranges of the activations were not observed", where=place)
        return found

    def _site(self, decision: Decision) -> Site | None:
        return None if self._statistics is None else self._statistics.site(decision.group.site)


def weights_digest(weight: Float32) -> str:
    """Return the SHA-256 of weights, float32 [rows, columns], with -0 counted as 0."""
    return hashlib.sha256(np.ascontiguousarray(weight + np.float32(0)).data).hexdigest()


def check_formats(decisions: list[Decision]) -> None:
    """Refuse formats that cannot hold their matrices.

    Raises:
        RequestError: a matrix's width does not fit its format.
    """
    for decision in decisions:
        if not decision.format.fits(decision.group.columns):
            raise RequestError(
                f"{decision.format.name} cannot hold rows of {decision.group.columns} weights",
                where=decision.group.name,
                expected=f"a multiple of {decision.format.block_columns}",
                next_step="choose another type",
            )
