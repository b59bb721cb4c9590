"""How a GGUF file stores feed-forward parts of unequal widths.

In most of its architectures, llama.cpp gives every layer the width that `feed_forward_length` states for the first.
Its `deci` computes the same as `llama` but reads one width per layer.
"""

from dataclasses import dataclass

from exporter.model.decoder import Decoder


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


def feed_forward_storage(decoder: Decoder) -> FeedForwardStorage:
    """Return how a GGUF file stores the feed-forward widths of a model."""
    own, with_widths = decoder.family.gguf.architecture, decoder.family.gguf.with_widths
    if decoder.one_width:
        return FeedForwardStorage(own, False, f"all layers are {decoder.intermediate[0]} wide")
    if with_widths is not None:
        return FeedForwardStorage(with_widths, False, f"written as {with_widths!r}, which reads a width for each layer")
    widest = max(decoder.intermediate)
    filled = f"zeros fill each up to {widest}, of which equal widths need none"
    return FeedForwardStorage(own, True, f"llama.cpp's {own!r} has one width for all layers: {filled}")
