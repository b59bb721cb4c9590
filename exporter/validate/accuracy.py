"""How far an artifact's behaviour is from the original's: one measure for every target, through its real runtime."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from exporter.calibrate.layers import LayerStream, hidden_states
from exporter.calibrate.text import Tokens
from exporter.model.model import Model
from exporter.weights.format import Float32
from exporter.weights.group import WeightGroup

TOKENS_AT_ONCE = 64
Logits = Callable[[list[int], int], Float32]


@dataclass(frozen=True)
class Reference:
    """A float model's next-token distributions, kept as the hidden states that the head sees.

    Logits follow from them exactly, and a hidden state is some hundred times smaller than its logits.

    Attributes:
        tokens: int64 [windows, length].
        hidden: float32 [windows, length, hidden].
        head: float32 [vocab, hidden].
    """

    tokens: Tokens
    hidden: torch.Tensor
    head: torch.Tensor

    @classmethod
    def of(cls, model: Model, tokens: Tokens) -> "Reference":
        """Run a float model over windows of tokens, layer by layer."""
        stream = LayerStream(model)
        return cls(tokens, hidden_states(stream, tokens), stream.head())

    def logits(self, window: int, positions: slice) -> torch.Tensor:
        """Return logits of some positions of a window, float32 [positions, vocab]."""
        return self.hidden[window, positions] @ self.head.T


@dataclass(frozen=True)
class Distance:
    """Differences of next-token distributions over the second half of each window.

    Attributes:
        kl_mean: Mean KL(reference || other), nats a token.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both rank the same token first.
        confident_agreement: The same where the reference's first token leads by more than 0.5 nats.
        perplexity_ratio: exp of the mean difference of the text's log-likelihoods.
        tokens: Positions compared.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    confident_agreement: float
    perplexity_ratio: float
    tokens: int


MARGIN_NATS = 0.5


@torch.inference_mode()
def distances(references: list[Reference], logits: Logits) -> list[Distance]:
    """Compare an artifact's logits with several references on the same tokens; the artifact runs once.

    The first half of each window only gives context. Sums are in float64, since KL may be below 1e-9.
    """
    rows: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in references]
    for window, tokens in enumerate(references[0].tokens):
        half = len(tokens) // 2
        other = torch.from_numpy(np.ascontiguousarray(logits(tokens.tolist(), half)))
        for start in range(half, len(tokens) - 1, TOKENS_AT_ONCE):
            positions = slice(start, min(start + TOKENS_AT_ONCE, len(tokens) - 1))
            following = torch.from_numpy(tokens[positions.start + 1 : positions.stop + 1])
            got = other[positions.start - half : positions.stop - half].double().log_softmax(-1)
            for reference, found in zip(references, rows, strict=True):
                found.append(_compare(reference.logits(window, positions), got, following))
    return [_summed(found) for found in rows]


def distance(reference: Reference, logits: Logits) -> Distance:
    """Compare an artifact's logits with one reference; see `distances`."""
    return distances([reference], logits)[0]


def _summed(rows: list[tuple[torch.Tensor, ...]]) -> Distance:
    kl, same, margin, gain = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    sure = margin > MARGIN_NATS
    return Distance(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(same.mean()),
        confident_agreement=float(same[sure].mean()) if sure.any() else 1.0,
        perplexity_ratio=float(np.exp(gain.mean())),
        tokens=len(kl),
    )


def _compare(expected: torch.Tensor, q: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Compare logits with log-probabilities, both [positions, vocab].

    Returns KL, same first token, lead of the first token, and loss of log-likelihood, each [positions].
    """
    p = expected.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    best = p.topk(2, dim=-1)
    same = best.indices[:, 0] == q.argmax(-1)
    loss = (p - q).gather(1, following[:, None])[:, 0]
    return kl, same.double(), best.values[:, 0] - best.values[:, 1], loss


class _Replaced:
    """The tensors of a model with its matrices replaced by those read back from an artifact."""

    def __init__(self, model: Model, read: Callable[[WeightGroup], Float32]) -> None:
        self._model = model
        self._read = read
        self._groups = {group.name: group for group in model.groups()}
        self.files = model.tensors.files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the source."""
        return self._model.tensors.shapes()

    def read(self, name: str) -> Float32:
        """Return a matrix from the artifact, any other tensor from the source."""
        return self._read(self._groups[name]) if name in self._groups else self._model.read(name)


def dequantised(model: Model, read: Callable[[WeightGroup], Float32]) -> Model:
    """Return the float model whose matrices are what the runtime decodes from the artifact."""
    return replace(model, tensors=_Replaced(model, read))
