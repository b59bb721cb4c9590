"""Rows of measurements, in JSON files that are kept beside the benchmarks. Light to import: tables are made of them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.foundation.cache import replacing

BENCHMARKS = Path(__file__).resolve().parent
PICTURES = BENCHMARKS.parents[1] / "docs" / "benchmarks"
# Weights of the reference model.
PARAMETERS = 134_515_008


@dataclass(frozen=True)
class Row:
    """One artifact through its real runtime.

    Attributes:
        name: The type, setting or mix; for ours, the opponent whose size it had to keep to.
        kind: `ours`, `stock`, `hand-made` or `recipe`, whose bytes are those that are shipped.
        target: `gguf` or `onnx`.
        file_bytes: Size of the model files.
        kl_mean: Mean KL(original || artifact), nats a token.
        top1: Share of tokens with the same first choice.
        predicted: The mean KL that was predicted, for ours.
        rounding: Of its mean KL, what the runtime's own rounding of activations adds; None where it was not measured.
        kl_p99: 99th percentile of KL; None where it was not measured.
        kl_p999: 99.9th percentile of KL; likewise.
        rounding_in_8_bits: What that adds to the very weights of the artifact in 8 bits; None where nobody asked.
    """

    name: str
    kind: str
    target: str
    file_bytes: int
    kl_mean: float
    top1: float
    predicted: float | None = None
    rounding: float | None = None
    rounding_in_8_bits: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the other rows of its conditions."""
        return self.name, self.kind, self.target


@dataclass(frozen=True)
class Published:
    """The JSON file: for each set of conditions what identifies it, and its rows.

    The opponents of the same model on the same texts, by the same versions of the tools, are not measured twice.
    Delete the file to measure all of them anew.
    """

    path: Path

    def rows(self, conditions: str, identity: dict[str, Any]) -> list[Row]:
        """Return the rows under these conditions, none where they were measured on something else."""
        return self.latest(conditions) if self._read().get(conditions, {}).get("identity") == identity else []

    def latest(self, conditions: str) -> list[Row]:
        """Return the rows under these conditions, whatever they were measured on."""
        return [Row(**row) for row in self._read().get(conditions, {}).get("rows", [])]

    def keep(self, conditions: str, identity: dict[str, Any], rows: list[Row]) -> None:
        """Write the rows under these conditions in place of those that were there."""
        document = self._read() | {conditions: {"identity": identity, "rows": [asdict(row) for row in rows]}}
        with replacing(self.path) as partial:
            partial.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}
        return found


class KeptRows:
    """The rows of one set of conditions, kept as soon as they are there, so that an interrupted run loses nothing.

    Attributes:
        rows: Those of this run.
    """

    def __init__(self, published: Published, conditions: str, identity: dict[str, Any]) -> None:
        self._published, self._conditions, self._identity = published, conditions, identity
        self._known = {row.key: row for row in published.rows(conditions, identity)}
        self.rows: list[Row] = []

    def row(self, name: str, kind: str, target: str, measure: Callable[[], Row]) -> Row:
        """Return a row, measured unless an earlier run has kept it."""
        known = self._known.get((name, kind, target))
        return self.keep(measure() if known is None else known)

    def keep(self, row: Row) -> Row:
        """Keep a row beside what earlier runs have kept, and return it."""
        self.rows.append(row)
        done = {one.key for one in self.rows}
        self._write([*self.rows, *(one for key, one in self._known.items() if key not in done)])
        return row

    def finish(self) -> None:
        """Drop rows that are no longer measured."""
        self._write(self.rows)

    def _write(self, rows: list[Row]) -> None:
        self._published.keep(self._conditions, self._identity, rows)
