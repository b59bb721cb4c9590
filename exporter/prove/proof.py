"""All checks of an artifact before it is packed."""

from dataclasses import dataclass
from functools import partial

from exporter.calibrate.windows import Tokens
from exporter.foundation.errors import ExporterError
from exporter.foundation.progress import Progress, silent
from exporter.foundation.quantities import Check
from exporter.model.model import Model
from exporter.model.tokenizer import load_tokenizer
from exporter.prove.accuracy import Distance, Reference, dequantised, distances
from exporter.prove.lowering import (
    Decoded,
    check_lowering,
    check_rounding,
    check_stored_types,
    check_weights,
    float_copy,
)
from exporter.prove.prompt import DECODE_TOKENS, prompt_for
from exporter.prove.self_test import SelfTest, make_self_test
from exporter.prove.text_checks import check_text, require_equal_ids
from exporter.targets.artifact import Artifact
from exporter.targets.contract import Lowered, Target
from exporter.targets.opened import OpenedArtifact
from exporter.targets.runtime import Timing
from exporter.targets.text import open_text

# The runtime's rounding differs little from window to window: the first third of them is enough.
ROUNDING_SHARE = 3
REPEATS = 3


@dataclass(frozen=True)
class Proof:
    """The results of checking an artifact.

    Attributes:
        accuracy: Distance from the original model.
        rounding: Distance of the artifact from the float model with the artifact's own weights.
        timing: Speed and memory in a separate process.
        checks: Checks of lowering, formats, tokenizer and chat template.
        self_test: Answers that the artifact must reproduce.
    """

    accuracy: Distance
    rounding: Distance
    timing: Timing
    checks: tuple[Check, ...]
    self_test: SelfTest


def prove(
    target: Target,
    lowered: Lowered,
    tokens: Tokens,
    context: int,
    threads: int,
    progress: Progress = silent,
) -> Proof:
    """Compare an artifact with its original in the real runtime, and time it.

    A chat template that differs is a failed check; an artifact that is not the planned model, or gives a text other ids
    without a known reason, is refused.

    Args:
        target: The artifact's target.
        lowered: The artifact, and what it must hold.
        tokens: Evaluation windows, int64 [windows, length].
        context: Tokens of context for measuring time and memory.
        threads: Threads of the runtime.
        progress: Called with the name of the step, steps done and their total.

    Raises:
        ExporterError: the artifact's weights, formats or behaviour are not those that were planned, or its ids differ.
        RuntimeCrashError: the runtime crashed on the artifact.
    """
    model, artifact = lowered.compression.original, lowered.artifact
    with OpenedArtifact(artifact, context, threads) as opened:
        prompt = prompt_for(tokens, context)
        progress("prove: speed", 0, 1)
        timing = opened.measure(prompt, DECODE_TOKENS, REPEATS)
        progress("prove: speed", 1, 1)
    original = Reference.of_original(model, tokens, partial(progress, "prove: layers of the original"))
    own, checks = _lowered(target, lowered, tokens, threads, progress)
    with OpenedArtifact(artifact, tokens.shape[1], threads) as opened:
        accuracy, rounding = distances([original, own], opened.logits, partial(progress, "prove: windows"))
        checks.append(check_rounding(rounding, target.most_rounding_kl))
        _require(checks)
        self_test = make_self_test(opened.logits, model.decoder.vocab, 0)
    checks += check_parity(artifact, model)
    return Proof(accuracy, rounding, timing, tuple(checks), self_test)


def _lowered(
    target: Target, lowered: Lowered, tokens: Tokens, threads: int, progress: Progress
) -> tuple[Reference, list[Check]]:
    """Return the float model with the artifact's own weights on some windows, and the checks of the lowering."""
    some = tokens[: -(-len(tokens) // ROUNDING_SHARE)]
    model = lowered.compression.model
    decoded = Decoded(target.read_back(lowered.artifact, model))
    layers = partial(progress, "prove: layers of the artifact")
    with float_copy(target, lowered, decoded) as copy:
        expected = Reference.of(copy.model, some, layers)
        own = expected if copy.whole else Reference.of(dequantised(model, decoded), some, layers)
        checks = [
            check_weights(decoded.digests, lowered),
            check_stored_types(target, lowered),
        ]
        _require(checks)
        checks.append(check_lowering(copy, expected, threads, progress))
    _require(checks)
    return own, checks


def _require(lowered: list[Check]) -> None:
    for check in lowered:
        if check.status == "failed":
            raise ExporterError(
                "the artifact is not the model that was planned, so no bundle is written",
                where=check.name,
                got=check.detail,
                next_step="please report this, with the model's name and the command",
            )


def check_parity(artifact: Artifact, model: Model) -> list[Check]:
    """Compare the artifact's tokenizer and chat template with the model's own.

    Raises:
        InputError: the artifact gives a text other ids, without a known reason.
    """
    tokenizer = load_tokenizer(model.folder, model.decoder.vocab)
    with open_text(artifact) as child:
        checks = check_text(child, tokenizer)
    require_equal_ids(checks, model.folder)
    return checks
