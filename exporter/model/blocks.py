"""The parts of a decoder block, as data: matrices, vectors, the sites between them, and their order of computation.

A family describes its blocks with these (`exporter.model.families`). Statistics, error propagation, channel scaling,
pruning and the targets follow the description, so that no other module knows how a block of some family is wired.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from exporter.formats.group import WeightGroup


@dataclass(frozen=True)
class Vector:
    """A gain, a bias, a convolution's kernel, or a small projection; every target stores it in float32.

    Attributes:
        role: Role in the block, such as `attention_norm` or `q_bias`.
        name: Name in the checkpoint.
        width: Number of channels.
        offset: Added to what the checkpoint stores: Gemma's norms multiply by 1 + w.
        kernel: Number of positions that a depthwise convolution sees; None for a gain or a bias, one number for each
            channel.
        rows: Outputs of a projection, of which the channels are the inputs; None for anything else.
    """

    role: str
    name: str
    width: int
    offset: float = 0.0
    kernel: int | None = None
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in a checkpoint; a convolution has one input for each of its outputs."""
        if self.rows is not None:
            return (self.rows, self.width)
        return (self.width,) if self.kernel is None else (self.width, 1, self.kernel)


@dataclass(frozen=True)
class Linear:
    """A matrix of a block.

    Attributes:
        group: Its name, shape and role.
        module: Path, within the block, of the module that multiplies by it: transformers' own, or for a slice the
            part of it that `exporter.model.module` makes.
        rotary_heads: Number of heads whose rows rotary embeddings turn; 0 for none.
        stored_in: Name of the tensor of the checkpoint whose rows hold those of several matrices, one after the other
            in the order of the block; None if the matrix is a tensor by itself.
    """

    group: WeightGroup
    module: str
    rotary_heads: int = 0
    stored_in: str | None = None

    @property
    def part(self) -> str:
        """Its name in the block, such as `down`."""
        return self.group.part

    @property
    def stacked_in(self) -> str | None:
        """Path of transformers' module that multiplies by several matrices, this one included; None for its own.

        For an expert's matrix it is the module of all experts.
        """
        if self.group.expert is not None:
            return self.module.rsplit(".", 2)[0]
        return None if self.stored_in is None else self.module.rpartition(".")[0]


@dataclass(frozen=True)
class Producer:
    """The tensors that make the channels of a site, and may absorb a division of them: the model stays the same.

    Attributes:
        vectors: The gain of the norm before the site, the biases of the matrix below, or the kernel of a convolution.
        linear: The matrix whose rows make the channels; None if the vectors alone take a division.
        by_heads: Its rows belong to key-value heads, each of which makes channels for several query heads.
    """

    vectors: tuple[Vector, ...] = ()
    linear: Linear | None = None
    by_heads: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors."""
        matrices = () if self.linear is None else (self.linear.group.name,)
        return (*matrices, *(vector.name for vector in self.vectors))


@dataclass(frozen=True)
class Site:
    """A place where the input of one or more matrices is observed.

    Attributes:
        name: Such as `layers.3.mlp_in`.
        linears: The matrices that take this input.
        producer: What may absorb a division of its channels; None if nothing may.
    """

    name: str
    linears: tuple[Linear, ...]
    producer: Producer | None = None

    @property
    def kind(self) -> str:
        """The name within the block, such as `mlp_in`."""
        return self.name.rpartition(".")[2]

    @property
    def columns(self) -> int:
        """Number of channels."""
        return self.linears[0].group.columns

    @property
    def routed(self) -> bool:
        """Whether it is in an expert, which only some tokens reach."""
        return self.linears[0].group.expert is not None


@dataclass(frozen=True)
class GatedChannels:
    """The matrices of down(act(gate x) * up x): channel c is row c of gate and up, and column c of down."""

    gate: Linear
    up: Linear
    down: Linear

    @property
    def axes(self) -> dict[str, int]:
        """Name of each matrix -> the axis of its channels."""
        return {self.gate.group.name: 0, self.up.group.name: 0, self.down.group.name: 1}


@dataclass(frozen=True)
class Sublayer:
    """A branch beside the residual stream: it reads the stream, and its output is added to it.

    Attributes:
        entrance: Path, within the block, of the first module that reads the stream.
        sites: In the order of computation.
        norm_before: The norm between the stream and the first site; None for none.
        norm_after: The norm between the last matrix and the stream; None if its outputs are added as they are.
        channels: The channels of a gated feed-forward part; None for any other.
        residual_scale: Factor of what is added to the stream.
    """

    entrance: str
    sites: tuple[Site, ...]
    norm_before: Vector | None = None
    norm_after: Vector | None = None
    channels: GatedChannels | None = None
    residual_scale: float = 1.0


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        layer: Its index.
        sublayers: In the order of computation.
        vectors: Its norms and biases, in the order in which files hold them.
        scale: The one of them by which the stream is multiplied at the end of the layer; None for none.
    """

    layer: int
    sublayers: tuple[Sublayer, ...]
    vectors: tuple[Vector, ...]
    scale: Vector | None = None

    @property
    def sites(self) -> Iterator[Site]:
        """The sites of all sublayers."""
        return (site for sublayer in self.sublayers for site in sublayer.sites)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """`WeightGroup.part` -> matrix, in the order of computation."""
        return {linear.part: linear for site in self.sites for linear in site.linears}

    @cached_property
    def channels(self) -> GatedChannels | None:
        """The channels of its gated feed-forward part; None if it has none."""
        return next((one.channels for one in self.sublayers if one.channels is not None), None)
