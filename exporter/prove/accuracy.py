"""Distance of an artifact's behaviour from the original's: one measure for every target, in its real runtime."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.calibrate.layer_stream import LayerStream, Progress, capped, hidden_states, silent
from exporter.calibrate.windows import Tokens
from exporter.formats.format import Float32, plus
from exporter.formats.group import WeightGroup
from exporter.foundation.cache import cache_folder
from exporter.foundation.cache_entries import ARRAY, kept
from exporter.model.model import Model
from exporter.prove.self_test import MARGIN_NATS

# Few enough that the double-precision copies of their logits stay in the processor's caches.
POSITIONS_AT_ONCE = 16
MEASURES = 4
VERSION = 1
Logits = Callable[[list[int], int], Float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """A float model's next-token distributions, stored as the hidden states before the head.

    Logits follow from them exactly, and a hidden state is some hundred times smaller than its logits.

    Attributes:
        tokens: int64 [windows, length].
        hidden: float32 [windows, length, hidden].
        head: float32 [vocab, hidden].
        divisor: What the head's outputs are divided by.
        cap: The cap of logits; see `exporter.model.shape.Shape.logits_cap`.
    """

    tokens: Tokens
    hidden: torch.Tensor
    head: torch.Tensor
    divisor: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Model, tokens: Tokens, progress: Progress = silent) -> "Reference":
        """Run a float model over windows of tokens, layer by layer.

        Args:
            model: The float model.
            tokens: int64 [windows, length].
            progress: Called with layers done and their total.
        """
        stream = LayerStream(model)
        return cls._ending(model, stream, tokens, hidden_states(stream, tokens, progress))

    @classmethod
    def of_original(cls, model: Model, tokens: Tokens, progress: Progress = silent) -> "Reference":
        """Do the same for a model from its source; its hidden states are cached for its next artifact."""
        text = hashlib.sha256(tokens.astype("<i8").tobytes()).hexdigest()
        key = hashlib.sha256(f"{VERSION}:{model.digest}:{tokens.shape}:{text}".encode()).hexdigest()[:32]
        path = cache_folder("references") / f"{key}.npy"
        stream = LayerStream(model)
        hidden = kept(path, ARRAY, lambda: hidden_states(stream, tokens, progress).numpy())
        return cls._ending(model, stream, tokens, torch.from_numpy(hidden))

    @classmethod
    def _ending(cls, model: Model, stream: LayerStream, tokens: Tokens, hidden: torch.Tensor) -> "Reference":
        return cls(tokens, hidden, stream.head(), model.decoder.logits_divisor, model.decoder.logits_cap)

    def logits(self, window: int, positions: slice) -> torch.Tensor:
        """Return logits of some positions of a window, float32 [positions, vocab]."""
        return capped(self.hidden[window, positions] / self.divisor @ self.head.T, self.cap)


@dataclass(frozen=True)
class Distance:
    """Differences of next-token distributions over the second half of each window.

    Attributes:
        kl_mean: Mean KL(reference || other), nats per token.
        kl_p99: Its 99th percentile.
        kl_p999: Its 99.9th percentile.
        top1_agreement: Share of positions where both rank the same token first.
        confident_agreement: The same at positions where the reference's first token leads by more than 0.5 nats.
        perplexity_ratio: exp of the mean difference of the text's log-likelihoods.
        tokens: Positions compared.
    """

    kl_mean: float
    kl_p99: float
    kl_p999: float
    top1_agreement: float
    confident_agreement: float
    perplexity_ratio: float
    tokens: int


@torch.inference_mode()
def distances(references: list[Reference], logits: Logits, progress: Progress = silent) -> list[Distance]:
    """Compare an artifact's logits with several references on the same tokens; the artifact runs once.

    The first half of each window only provides context. Sums are in float64, since KL may be below 1e-9.

    Args:
        references: All on the windows of the first one, or on the first of these windows.
        logits: Returns the artifact's logits of a window's tokens from a position on, float32 [positions, vocab].
        progress: Called with windows done and their total.
    """
    windows = references[0].tokens
    half = windows.shape[1] // 2
    following = torch.from_numpy(windows[:, half + 1 :])
    # Allocated as a whole from the start: small tensors that outlive large ones would fragment the heap.
    found = [torch.zeros(MEASURES, *following[: len(r.tokens)].shape, dtype=torch.float64) for r in references]
    for window, tokens in enumerate(windows):
        progress(window, len(windows))
        got = torch.from_numpy(logits(tokens.tolist(), half))
        for reference, measured in zip(references, found, strict=True):
            if window >= len(reference.tokens):
                continue
            expected = reference.logits(window, slice(half, len(tokens) - 1))
            for start in range(0, len(expected), POSITIONS_AT_ONCE):
                part = slice(start, min(start + POSITIONS_AT_ONCE, len(expected)))
                measured[:, window, part] = _compare(expected[part], got[part], following[window, part])
    progress(len(windows), len(windows))
    return [_summed(*measured.flatten(1).numpy()) for measured in found]


def distance(reference: Reference, logits: Logits, progress: Progress = silent) -> Distance:
    """Compare an artifact's logits with one reference; see `distances`."""
    return distances([reference], logits, progress)[0]


def _summed(kl: Float64, same: Float64, lead: Float64, loss: Float64) -> Distance:
    sure = lead > MARGIN_NATS
    return Distance(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1_agreement=float(same.mean()),
        confident_agreement=float(same[sure].mean()) if sure.any() else 1.0,
        perplexity_ratio=float(np.exp(loss.mean())),
        tokens=len(kl),
    )


def _compare(expected: torch.Tensor, got: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Compare logits, both float32 [positions, vocab].

    Returns float64 [MEASURES, positions]: KL, same first token, lead of the reference's first, loss of log-likelihood.
    """
    first = expected.max(dim=-1)
    lead = first.values - expected.scatter(1, first.indices[:, None], -torch.inf).amax(-1)
    same = first.indices == got.argmax(-1)
    p, gain = _gain(expected, got)
    loss = gain.gather(1, following[:, None])[:, 0]
    kl = gain.mul_(p.exp_()).sum(-1)
    return torch.stack([kl, same, lead, loss])


@torch.inference_mode()
def divergence(expected: Float32, got: Float32) -> Float64:
    """Return KL(expected || got) of each position, float64 [positions]; logits are float32 [positions, vocab]."""
    kl = torch.empty(len(expected), dtype=torch.float64)
    for start in range(0, len(expected), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        p, gain = _gain(torch.from_numpy(expected[part]), torch.from_numpy(got[part]))
        kl[part] = gain.mul_(p.exp_()).sum(-1)
    found: Float64 = kl.numpy()
    return found


def _gain(expected: torch.Tensor, got: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of `expected`, and its difference from that of `got`, both float64 [positions, vocab]."""
    p = expected.log_softmax(-1, dtype=torch.float64)
    return p, p - got.log_softmax(-1, dtype=torch.float64)


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

    def read_rows(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """Return some rows of a matrix from the artifact."""
        return self.read(name)[rows]


def dequantised(model: Model, read: Callable[[WeightGroup], Float32]) -> Model:
    """Return the float model with the matrices that the runtime decodes from the artifact."""
    return replace(model, tensors=_Replaced(model, read))


def merged(model: Model) -> Model:
    """Return the float model with the adapter merged that it has beside it; the same one without an adapter."""
    ranks = model.ranks()

    def read(group: WeightGroup) -> Float32:
        weight = model.read(group.name)
        return plus(weight, *model.factors(group.name)) if group.name in ranks else weight

    return dequantised(model, read) if ranks else model
