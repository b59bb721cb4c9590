"""How a GGUF file stores feed-forward parts of unequal widths.

In most of its architectures, llama.cpp gives every layer the width that `feed_forward_length` states for the first.
Its `deci` computes the same as `llama` but reads one width per layer.
"""

from dataclasses import dataclass

from exporter.model.architecture import Architecture

WITH_WIDTHS = {"llama": "deci"}


@dataclass(frozen=True)
class FeedForwardStorage:
    """How a model's feed-forward widths are stored.

    Attributes:
        architecture: `general.architecture` of the file.
        padded: Layers are padded with zero channels to the widest one, since the file has one width for all.
        reason: An explanation for the user.
    """

    architecture: str
    padded: bool
    reason: str


def feed_forward_storage(architecture: Architecture) -> FeedForwardStorage:
    """Return how a GGUF file stores the feed-forward widths of a model."""
    own = architecture.family.gguf_architecture
    if architecture.even:
        return FeedForwardStorage(own, False, f"all layers are {architecture.intermediate[0]} wide")
    if own in WITH_WIDTHS:
        with_widths = WITH_WIDTHS[own]
        return FeedForwardStorage(with_widths, False, f"written as {with_widths!r}, which reads a width for each layer")
    widest = max(architecture.intermediate)
    filled = f"zeros fill each up to {widest}, of which equal widths need none"
    return FeedForwardStorage(own, True, f"llama.cpp's {own!r} has one width for all layers: {filled}")
