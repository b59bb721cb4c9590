"""Which format each matrix gets: the least predicted KL divergence within a number of bytes.

What a format costs in behaviour is predicted by the quadratic form of `exporter.calibrate.statistics` on some rows of
each matrix, with the error that the method expects there and what the runtime's own rounding adds. One Lagrange
multiplier over all matrices trades it against bytes (Shoham and Gersho 1988, section III); what bytes remain go to the
upgrades that buy most for each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.calibrate.moments import Site
from exporter.calibrate.statistics import Statistics
from exporter.compress.method import Method
from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.weights.format import Float32, WeightFormat
from exporter.weights.group import WeightGroup

Float64 = NDArray[np.float64]
SAMPLED_ROWS = 64
SAMPLED_TABLE_ROWS = 1024
BISECTIONS = 150
# Nats a byte: so dear that the smallest formats win.
HIGHEST_PRICE = 1e30


@dataclass(frozen=True)
class Storage:
    """Matrices that must have one format, and the formats that they can have."""

    groups: tuple[WeightGroup, ...]
    formats: tuple[WeightFormat, ...]


@dataclass(frozen=True)
class Choice:
    """A format for a storage: its bytes, and the KL divergence a token, in nats, that it is predicted to add."""

    format: WeightFormat
    bytes: int
    kl: float


def predict(
    model: Model,
    storages: Sequence[Storage],
    method: Method,
    statistics: Statistics,
    progress: Callable[[int, int], None],
) -> list[list[Choice]]:
    """Return the choices of each storage, from some rows of its matrices.

    Args:
        model: The source.
        storages: What there is to decide.
        method: Method that will encode.
        statistics: Of the model's inputs and outputs.
        progress: Called with storages done and their total.
    """
    found = []
    for done, storage in enumerate(storages):
        progress(done, len(storages))
        parts = [_sampled(model, group, statistics) for group in storage.groups]
        found.append(
            [
                Choice(format, _stored_bytes(storage, format), sum(part.kl(method, format) for part in parts))
                for format in storage.formats
            ]
        )
    progress(len(storages), len(storages))
    return found


@dataclass(frozen=True)
class _Sample:
    """Rows that stand for a matrix.

    Attributes:
        weight: float32 [rows, columns].
        site: What was seen of the inputs, or None for a table that is only looked up.
        rows: Sensitivity of each row as an output, scaled up to the whole matrix, float64 [rows].
        lookups: The same of each row as what is looked up, float64 [rows]; zeros where it is not.
        columns: Sensitivity of each column of what is looked up, float32 [columns]; zeros likewise.
    """

    weight: Float32
    site: Site | None
    rows: Float64
    lookups: Float64
    columns: Float32

    def kl(self, method: Method, format: WeightFormat) -> float:
        """Return the KL divergence that a format is predicted to cause, the runtime's rounding included."""
        expected = method.expected_error(self.weight, format, self.site, self.columns)
        kl = float(self.rows @ expected.outputs + self.lookups @ expected.lookups)
        return kl / 2 + self._rounding_kl(format)

    def _rounding_kl(self, format: WeightFormat) -> float:
        """Return what it costs that the runtime rounds the inputs to 8 bits, block by block.

        Within a block the error of each input is even over a step of max |x| / 127, its variance a twelfth of that
        squared.
        """
        block = format.activation_block
        if self.site is None or block is None or block not in self.site.peaks:
            return 0.0
        variance = np.repeat(self.site.peaks[block], block) / (127**2 * 12)
        return float(self.rows @ (self.weight**2 @ variance)) / 2


def _sampled(model: Model, group: WeightGroup, statistics: Statistics) -> _Sample:
    table = group.layer is None
    count = min(group.rows, SAMPLED_TABLE_ROWS if table else SAMPLED_ROWS)
    # Spread evenly: neighbouring rows belong to one head.
    chosen = np.unique(np.linspace(0, group.rows - 1, count).astype(np.int64))
    rows, lookups, columns = np.zeros(len(chosen)), np.zeros(len(chosen)), np.zeros(group.columns, np.float32)
    if group.site != "tokens":
        rows = _scaled_up(statistics.sensitivity(group.layer, "head" if table else group.role), chosen)
    if "embedding" in group.uses:
        frequencies, columns = statistics.lookups()
        lookups = _scaled_up(frequencies, chosen)
    return _Sample(model.read(group.name)[chosen], statistics.site(group.site), rows, lookups, columns)


def _scaled_up(values: Float32, chosen: NDArray[np.int64]) -> Float64:
    """Return some of the values, float64, scaled so that they sum to what all of them do."""
    part: Float64 = values[chosen].astype(np.float64)
    part *= float(values.sum(dtype=np.float64)) / max(float(part.sum()), 1e-300)
    return part


def smallest_bytes(storage: Storage) -> int:
    """Return the bytes of a storage in its smallest format."""
    return min(_stored_bytes(storage, format) for format in storage.formats)


def _stored_bytes(storage: Storage, format: WeightFormat) -> int:
    return sum(format.stored_bytes(group.rows, group.columns) for group in storage.groups)


def require_enough(budget_bytes: int, smallest: int) -> None:
    """Refuse a budget below the smallest choice.

    Raises:
        RequestError: it is; the smallest is named.
    """
    if smallest > budget_bytes:
        raise RequestError(
            "no choice of formats is so small",
            got=f"{budget_bytes:,} bytes",
            expected=f"at least {smallest:,}",
            next_step="raise the budget by what is missing",
        )


def allocate(choices: Sequence[Sequence[Choice]], budget_bytes: int, fixed_bytes: int = 0) -> list[Choice]:
    """Return one choice for each storage: the least sum of KL found within a budget of bytes.

    Args:
        choices: What each storage may have.
        budget_bytes: Most bytes in all.
        fixed_bytes: Bytes of the budget that are spent already, on what is no matrix.

    Raises:
        RequestError: even the smallest choices take more.
    """
    require_enough(budget_bytes, fixed_bytes + sum(min(choice.bytes for choice in some) for some in choices))
    budget_bytes -= fixed_bytes
    low, high = 0.0, HIGHEST_PRICE
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5 if low else high / 10
        if _bytes(_cheapest(choices, middle)) <= budget_bytes:
            high = middle
        else:
            low = middle
    return _filled_up(choices, _cheapest(choices, high), budget_bytes)


def _cheapest(choices: Sequence[Sequence[Choice]], price: float) -> list[Choice]:
    return [min(some, key=lambda choice: (choice.kl + price * choice.bytes, choice.bytes)) for some in choices]


def _filled_up(choices: Sequence[Sequence[Choice]], chosen: list[Choice], budget_bytes: int) -> list[Choice]:
    """Spend what is left on the upgrades that buy most KL for each byte, one at a time."""
    chosen = list(chosen)
    while True:
        left = budget_bytes - _bytes(chosen)
        upgrades = [
            ((now.kl - choice.kl) / max(choice.bytes - now.bytes, 1), index, choice)
            for index, now in enumerate(chosen)
            for choice in choices[index]
            if choice.kl < now.kl and choice.bytes - now.bytes <= left
        ]
        if not upgrades:
            return chosen
        _, index, best = max(upgrades, key=lambda upgrade: upgrade[0])
        chosen[index] = best


def _bytes(chosen: Sequence[Choice]) -> int:
    return sum(choice.bytes for choice in chosen)
