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
        width_factors: Feed-forward width of each layer as a multiple of the one that config.json states.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dims: Width of a head in each layer.
        key_layers: For each layer, the earlier one whose keys and values it attends to; None for its own.
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
        logits_cap: The most that logits may be: c tanh(x / c) of them is taken; None for no cap.
        layer_input_width: Width of what each layer is given of a token besides the residual stream; 0 for nothing.
        activation: Name of the activation of the feed-forward parts.
        experts: The experts of each layer; None for none.
    """

    layers: int
    hidden: int
    intermediate: tuple[int, ...]
    width_factors: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dims: tuple[int, ...]
    key_layers: tuple[int | None, ...]
    rotary_width: int
    vocab: int
    tied: bool
    positions: int
    windows: tuple[int | None, ...]
    convolutions: tuple[int | None, ...]
    embedding_scale: float
    residual_scale: float
    logits_divisor: float
    logits_cap: float | None
    layer_input_width: int
    activation: str
    experts: Experts | None = None

    @property
    def window(self) -> int | None:
        """The shortest attention window; None if no layer has one."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def head_dim(self) -> int:
        """Width of the widest head."""
        return max(self.head_dims)

    @property
    def attention_layers(self) -> int:
        """Number of layers of attention."""
        return self.convolutions.count(None)

    @property
    def key_channels(self) -> int:
        """Number of channels of the keys that a token leaves in the layers together; values have as many."""
        return sum(
            self.kv_heads * width
            for width, kernel, other in zip(self.head_dims, self.convolutions, self.key_layers, strict=True)
            if kernel is None and other is None
        )

    def carried(self, layer: int) -> tuple[int, ...]:
        """Return the layers before one whose keys and values it, or a later layer, attends to."""
        return tuple(sorted({one for one in self.key_layers[layer:] if one is not None and one < layer}))

    @property
    def one_width(self) -> bool:
        """Whether all layers have the same feed-forward width."""
        return len(set(self.intermediate)) == 1

    @property
    def even(self) -> bool:
        """Whether the feed-forward widths are those of a model that config.json can describe."""
        return len({width / times for width, times in zip(self.intermediate, self.width_factors, strict=True)}) == 1
