"""Checks the rest of an artifact apart from its weights: a float32 copy is run in the same runtime.

Rounding hides a small fault of the graph, of the header or of a vector. In float32 there is almost no rounding, only a
different order of sums, so a fault stands out.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from exporter.compress.compression import weights_digest
from exporter.formats.floats import FLOAT32
from exporter.formats.format import Float32
from exporter.formats.group import Decision, WeightGroup
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.excerpt import excerpt_if_large
from exporter.model.model import Model
from exporter.prove.accuracy import Distance, Reference, dequantised, distance, merged
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered, Target
from exporter.targets.opened import OpenedArtifact


class Decoded:
    """Matrices as the runtime decodes them from the artifact's bytes; each is hashed when it is read."""

    def __init__(self, read: Callable[[WeightGroup], Float32]) -> None:
        self._read = read
        self.digests: dict[str, str] = {}

    def __call__(self, group: WeightGroup) -> Float32:
        """Return a matrix, float32 [rows, columns], rows in the source's order."""
        weight = self._read(group)
        self.digests[group.name] = weights_digest(weight)
        return weight


@dataclass(frozen=True)
class FloatCopy:
    """The weights of an artifact, written in float32 for the same runtime.

    With an adapter beside it, these are the weights of the base and the adapter before they were encoded: the artifact
    decodes to sums, of which the runtime has to be given the parts.

    Attributes:
        artifact: The copy, or the artifact itself if it is in float32 already.
        model: The float model that it must compute, any adapter merged.
        whole: Whether it holds every layer, not only those of an excerpt.
        decoded: Whether the model has the matrices as the runtime decodes them from the artifact.
        most_kl: How far the runtime may be from that model, in nats.
    """

    artifact: Artifact
    model: Model
    whole: bool
    decoded: bool
    most_kl: float


def in_float32(decisions: Iterable[Decision]) -> bool:
    """Return whether all matrices are stored in float32."""
    return all(decision.stored_as == FLOAT32.name for decision in decisions)


@contextmanager
def float_copy(target: Target, lowered: Lowered, decoded: Decoded) -> Iterator[FloatCopy]:
    """Write the float32 copy of an artifact next to it; it is deleted at the end.

    Args:
        target: The artifact's target.
        lowered: The artifact, and what it was made of.
        decoded: Returns the matrices as the runtime decodes them from the artifact.
    """
    given = lowered.compression.model
    artifact, most_kl = lowered.artifact, target.most_lowering_kl(given.decoder.family)
    if in_float32(lowered.compression.decided):
        yield FloatCopy(artifact, dequantised(given, decoded), True, True, most_kl)
        return
    parts = given if given.ranks() else dequantised(given, decoded)
    some = excerpt_if_large(parts)
    with TemporaryDirectory(prefix=".float-", dir=artifact.folder.parent) as scratch:
        copy = target.write_float(some, Path(scratch))
        yield FloatCopy(copy, merged(some), some is parts, parts is not given, most_kl)


def check_lowering(copy: FloatCopy, expected: Reference, threads: int, progress: Progress = silent) -> Check:
    """Compare the float32 copy, run by the artifact's runtime, with the float model of the same weights.

    Args:
        copy: The copy.
        expected: Its float model's next-token distributions.
        threads: Threads of the runtime.
        progress: Called with the name of the step, steps done and their total.

    Returns:
        The check `lowering`; its value is the mean KL in nats.
    """
    with OpenedArtifact(copy.artifact, expected.tokens.shape[1], threads, exact=True) as opened:
        found = distance(expected, opened.logits, partial(progress, "prove: windows in float32"))
    layers = "every layer" if copy.whole else f"{copy.model.decoder.layers} layers, the first and the last among them,"
    return Check(
        name="lowering",
        status="passed" if found.kl_mean <= copy.most_kl else "failed",
        detail=f"KL {found.kl_mean:.1e} of {layers} in float32 against the float model of the same weights",
        value=found.kl_mean,
        limit=copy.most_kl,
        unit="nats",
    )


def check_weights(decoded: dict[str, str], lowered: Lowered) -> Check:
    """Compare the digests of all matrices, decoded from the artifact as its runtime does, with the planned ones."""
    planned = {name: outcome.planned_sha256 for name, outcome in lowered.outcomes.items()}
    wrong = [name for name, digest in planned.items() if decoded.get(name) != digest]
    detail = f"{len(planned) - len(wrong)} of {len(planned)} matrices decode to exactly the planned weights"
    return _check("lowering.weights", not wrong, detail + (f"; the first that does not: {wrong[0]}" if wrong else ""))


def check_stored_types(target: Target, lowered: Lowered) -> Check:
    """Compare the formats in the file with the planned ones."""
    stored = target.stored_types(lowered.artifact, lowered.compression.model)
    wrong = [name for name, decision in lowered.compression.decisions.items() if stored[name] != decision.stored_as]
    detail = f"{len(stored) - len(wrong)} of {len(stored)} matrices are stored in the format decided on"
    return _check("lowering.formats", not wrong, detail + (f"; the first that is not: {wrong[0]}" if wrong else ""))


def check_rounding(rounding: Distance, most_kl: float) -> Check:
    """Check that rounding of activations costs less than a packing error would."""
    detail = f"KL {rounding.kl_mean:.4f} of the artifact against a float model with the artifact's own weights"
    passed = rounding.kl_mean <= most_kl
    check = _check("lowering.runtime_rounding", passed, detail)
    return check.model_copy(update={"value": rounding.kl_mean, "limit": most_kl, "unit": "nats"})


def _check(name: str, passed: bool, detail: str) -> Check:
    return Check(name=name, status="passed" if passed else "failed", detail=detail)
