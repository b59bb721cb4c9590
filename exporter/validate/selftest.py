"""The self-test that travels in a bundle: what the artifact answered when it was made."""

from collections.abc import Callable

import numpy as np

from exporter.measures import Check, Document
from exporter.weights.format import Float32

PROMPT_TOKENS = 24
MARGIN_NATS = 0.5
# Runtimes on other CPUs sum in another order; a packing fault moves logits by much more.
TOLERANCE = 2.0

UNSURE = "the artifact was sure of no token of the prompt when the bundle was made, so there is nothing to compare"

Logits = Callable[[list[int]], Float32]


class SelfTest(Document):
    """A prompt of token ids and what must come of it; the ids are random, so that no private text travels.

    Attributes:
        prompt: Token ids.
        positions: Positions whose first token leads by more than 0.5 nats; elsewhere rounding may decide.
        expected: The first token at each of these positions.
        logits: Its logit there.
        tolerance: Most that such a logit may differ by.
    """

    prompt: tuple[int, ...]
    positions: tuple[int, ...]
    expected: tuple[int, ...]
    logits: tuple[float, ...]
    tolerance: float


def make_self_test(logits: Logits, vocab: int, seed: int) -> SelfTest:
    """Ask the artifact for the answers that it must give again."""
    prompt = np.random.default_rng(seed).integers(0, vocab, PROMPT_TOKENS).tolist()
    rows = logits(prompt)
    best = np.sort(rows, axis=1)
    positions = np.flatnonzero(best[:, -1] - best[:, -2] > MARGIN_NATS).tolist()
    expected = rows[positions].argmax(axis=1).tolist()
    values = [round(float(rows[at, token]), 3) for at, token in zip(positions, expected, strict=True)]
    return SelfTest(
        prompt=tuple(prompt),
        positions=tuple(positions),
        expected=tuple(expected),
        logits=tuple(values),
        tolerance=TOLERANCE,
    )


def run_self_test(test: SelfTest, logits: Logits) -> Check:
    """Compare the artifact's answers with those of the time when it was made; without any, nothing is compared."""
    if not test.positions:
        return Check(name="selftest", status="not run", detail=UNSURE)
    rows = logits(list(test.prompt))
    right = sum(
        int(rows[at].argmax()) == token and abs(float(rows[at, token]) - value) <= test.tolerance
        for at, token, value in zip(test.positions, test.expected, test.logits, strict=True)
    )
    detail = f"{right} of {len(test.positions)} positions answer as when the bundle was made"
    return Check(name="selftest", status="passed" if right == len(test.positions) else "failed", detail=detail)
