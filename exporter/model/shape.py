"""The sizes of a decoder."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experts:
    """The experts of each layer.

    Attributes:
        count: Experts of a layer.
        used: Those that compute each token.
        width: Feed-forward width of an expert.
    """

    count: int
    used: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder; names follow config.json where possible.

    Attributes:
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        intermediate: Feed-forward width of each decoder layer; pruning can make these differ.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        rotary_width: Number of a head's channels that rotary embeddings turn.
        vocab: Rows of the embedding.
        tied: The embedding serves as the head.
        positions: Most positions for which the model has one set of rotary embeddings.
        windows: Attention window of each layer; None for none, or for one that no position exceeds.
        convolutions: Kernel of the short convolution that a layer has in place of attention, in positions; None for a
            layer of attention.
        embedding_scale: Factor of embeddings before the first block.
        residual_scale: Factor of what sublayers add to the residual stream.
        logits_divisor: What the head's outputs are divided by.
        activation: Name of the activation of the feed-forward parts.
        experts: The experts of each layer; None for none.
    """

    layers: int
    hidden: int
    intermediate: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary_width: int
    vocab: int
    tied: bool
    positions: int
    windows: tuple[int | None, ...]
    convolutions: tuple[int | None, ...]
    embedding_scale: float
    residual_scale: float
    logits_divisor: float
    activation: str
    experts: Experts | None = None

    @property
    def window(self) -> int | None:
        """The shortest attention window; None if no layer has one."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def attention_layers(self) -> int:
        """Number of layers of attention, which keep keys and values."""
        return self.convolutions.count(None)

    @property
    def even(self) -> bool:
        """Whether all layers have the same feed-forward width."""
        return len(set(self.intermediate)) == 1
