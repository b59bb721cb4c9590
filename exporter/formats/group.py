"""Weight groups and the decision made for each."""

from dataclasses import dataclass

from exporter.formats.format import LowRank, WeightFormat


@dataclass(frozen=True)
class WeightGroup:
    """A matrix with all its uses.

    Attributes:
        name: Tensor name in the source model, such as `model.layers.0.mlp.down_proj.weight`.
        role: Role in the network, such as `down`; see `exporter.model.families`.
        layer: Index of the decoder layer, or None outside the layers.
        rows: Outputs (for the embedding: tokens).
        columns: Inputs.
        uses: Uses of the storage; a tied embedding has `("embedding", "head")`.
        site: Where its input is observed, such as `layers.0.mlp_out`; see `exporter.calibrate.statistics`.
        expert: Number of the expert that it belongs to; None outside of experts.
        share: Share of the tokens that are multiplied by it.
        exact: It is kept in float32, whatever the type of the model: it chooses the experts.
        first_row: Row of the whole table at which it begins, if it is a part of one.
    """

    name: str
    role: str
    layer: int | None
    rows: int
    columns: int
    uses: tuple[str, ...]
    site: str
    expert: int | None = None
    share: float = 1.0
    exact: bool = False
    first_row: int = 0

    @property
    def part(self) -> str:
        """The role, with the number of the expert if it has one: unique in its layer."""
        return self.role if self.expert is None else f"{self.role}.{self.expert}"

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Decision:
    """The treatment of one weight group and its reason; data for the plan, the encoder and the report.

    Attributes:
        group: The weight group.
        method: Name of the compression method.
        format: Its storage format.
        reason: Explanation for the user.
        predicted_kl: Predicted increase of the KL divergence per token on the evaluation text, in nats; None before
            statistics.
        calibration_kl: The same on the calibration text.
        low_rank: Factors that are fitted to what the format loses, and stored with it; None for no such factors.
        adapter: Factors of an adapter that are stored beside it as they are given; None for none. A matrix has factors
            of one kind at most.
    """

    group: WeightGroup
    method: str
    format: WeightFormat
    reason: str
    predicted_kl: float | None = None
    calibration_kl: float | None = None
    low_rank: LowRank | None = None
    adapter: LowRank | None = None

    @property
    def beside(self) -> LowRank | None:
        """The factors that are stored with it, fitted or given; None for none."""
        return self.low_rank or self.adapter

    @property
    def stored_as(self) -> str:
        """The format's name, with rank and format of any factors: `Q4_0+r32-Q8_0`."""
        return self.format.name if self.beside is None else f"{self.format.name}+{self.beside.name}"

    @property
    def base_bytes(self) -> int:
        """Bytes of the group without its factors."""
        return self.format.stored_bytes(self.group.rows, self.group.columns)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the group in the model files."""
        beside = self.beside.stored_bytes(self.group.rows, self.group.columns) if self.beside else 0
        return self.base_bytes + beside
