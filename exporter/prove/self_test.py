"""The self-test in a bundle: the artifact's answers when it was made."""

from collections.abc import Callable
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.foundation.quantities import Check, Document

PROMPT_TOKENS = 24
MARGIN_NATS = 0.5
# Runtimes on other CPUs sum in another order; a packing fault changes logits by much more.
TOLERANCE = 2.0

UNSURE = "the artifact was sure of no token of the prompt when the bundle was made, so there is nothing to compare"

Logits = Callable[[list[int]], Float32]


MOST_TOKENS = 64
MOST_ID = 1 << 24
MOST_LOGIT = 1e6

TokenIds = Annotated[tuple[Annotated[int, Field(ge=0, lt=MOST_ID)], ...], Field(max_length=MOST_TOKENS)]
Logit = Annotated[float, Field(ge=-MOST_LOGIT, le=MOST_LOGIT)]


class SelfTest(Document):
    """A prompt of token ids and the expected answers; the ids are random, so that no private text is shipped.

    Attributes:
        prompt: Token ids, at least one.
        positions: Positions in it, ascending, whose top token leads by more than 0.5 nats; at others, rounding may
            decide.
        expected: The top token at each of these positions.
        logits: Its logit there.
        tolerance: Largest allowed difference of such a logit: `TOLERANCE`.
    """

    prompt: Annotated[TokenIds, Field(min_length=1)]
    positions: TokenIds
    expected: TokenIds
    logits: Annotated[tuple[Logit, ...], Field(max_length=MOST_TOKENS)]
    tolerance: float

    @model_validator(mode="after")
    def _is_of_ours(self) -> Self:
        if self.tolerance != TOLERANCE:
            raise ValueError(f"the tolerance must be {TOLERANCE:g}, not {self.tolerance:g}")
        if not len(self.positions) == len(self.expected) == len(self.logits):
            raise ValueError("each position must have an expected token and its logit")
        if list(self.positions) != sorted({at for at in self.positions if at < len(self.prompt)}):
            raise ValueError(f"positions must ascend, below the prompt's {len(self.prompt)} tokens")
        return self

    def require_below(self, vocab: int, where: object) -> None:
        """Refuse ids outside a vocabulary of this size.

        Raises:
            InputError: an id is outside it.
        """
        most = max((*self.prompt, *self.expected))
        if most >= vocab:
            raise InputError(
                "the self-test has a token that the model has not", where=where, got=most, expected=f"below {vocab:,}",
                next_step="get the bundle again",
            )  # fmt: skip


def make_self_test(logits: Logits, vocab: int, seed: int) -> SelfTest:
    """Record the artifact's answers that it must reproduce."""
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
    """Compare the artifact's answers with those from when it was made; without any, nothing is compared."""
    if not test.positions:
        return Check(name="selftest", status="not run", detail=UNSURE)
    rows = logits(list(test.prompt))
    right = sum(
        int(rows[at].argmax()) == token and abs(float(rows[at, token]) - value) <= test.tolerance
        for at, token, value in zip(test.positions, test.expected, test.logits, strict=True)
    )
    detail = f"{right} of {len(test.positions)} positions answer as when the bundle was made"
    return Check(name="selftest", status="passed" if right == len(test.positions) else "failed", detail=detail)
