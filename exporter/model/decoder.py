"""A decoder as data: its sizes, read from config.json, its blocks, and the tensors that they imply."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PretrainedConfig

from exporter.formats.group import WeightGroup
from exporter.foundation.errors import InputError
from exporter.model.blocks import Block, Linear, Site, Vector
from exporter.model.family import Family, families
from exporter.model.limits import MAX_LAYERS, MAX_POSITIONS, whole_number
from exporter.model.rotary import rotary_width, unchanged_until
from exporter.model.shape import Shape

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# What makes a layer's own inputs of a token: a table that is looked up, and a projection of the embedding with a norm.
LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
LAYER_PROJECTION, LAYER_PROJECTION_NORM = (
    f"model.{name}.weight" for name in ("per_layer_model_projection", "per_layer_projection_norm")
)
HEAD_SITE = "head_in"
# The place of the inputs of a table that is only looked up, which are tokens.
TOKENS = "tokens"
# A table of inputs of layers is compressed in parts of so many rows: as a whole it may be half of a model.
ROWS_OF_A_PART = 16384
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias")


@dataclass(frozen=True, kw_only=True)
class Decoder(Shape):
    """A decoder: its sizes, and its blocks as its family describes them."""

    family: Family

    @classmethod
    def of(cls, config: PretrainedConfig, where: object) -> "Decoder":
        """Read the decoder from a transformers config.

        Raises:
            InputError: the architecture is not supported, or a number is missing or impossible.
        """
        known = families()
        named = (config.architectures or [type(config).__name__.replace("Config", "ForCausalLM")])[0]
        if named not in known:
            raise InputError(
                f"the architecture {named!r} is not supported", where=where, expected="one of " + ", ".join(known)
            )
        family = known[named]
        for flag in family.refused_flags:
            if getattr(config, flag, False):
                raise InputError(f"a {named} with {flag}=true is not supported", where=where, expected=f"{flag}=false")
        layers = whole_number(config, "num_hidden_layers", where, MAX_LAYERS)
        heads = whole_number(config, "num_attention_heads", where)
        hidden = whole_number(config, "hidden_size", where)
        positions = min(whole_number(config, "max_position_embeddings", where, MAX_POSITIONS), unchanged_until(config))
        windows = family.windows(config, where)
        if len(windows) != layers:
            raise InputError("layer_types does not name each layer", where=where, got=len(windows), expected=layers)
        width, factors = whole_number(config, family.width_key, where), family.width_factors(config, where)
        head_dims = family.head_dims(config, where)
        decoder = cls(
            family=family,
            layers=layers,
            hidden=hidden,
            intermediate=tuple(times * width for times in factors),
            width_factors=factors,
            heads=heads,
            kv_heads=whole_number(config, "num_key_value_heads", where, default=heads),
            head_dims=head_dims,
            key_layers=family.key_layers(config, where),
            rotary_width=rotary_width(config, max(head_dims)),
            vocab=whole_number(config, "vocab_size", where),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            positions=positions,
            windows=tuple(window if window is not None and window < positions else None for window in windows),
            convolutions=family.convolutions(config, where),
            embedding_scale=family.embedding_scale(config),
            residual_scale=family.residual_scale(config),
            logits_divisor=family.logits_divisor(config),
            logits_cap=family.logits_cap(config),
            layer_input_width=family.layer_input_width(config, where),
            activation="silu" if family.activation_key is None else getattr(config, family.activation_key),
            experts=family.experts(config, where),
        )
        if heads % decoder.kv_heads or any(one % 2 for one in (*head_dims, decoder.rotary_width)):
            raise InputError(
                "the heads do not divide evenly",
                where=where,
                got=f"{heads} heads, {decoder.kv_heads} key-value heads, head width {decoder.head_dim}, "
                f"of which rotary embeddings turn {decoder.rotary_width}",
                expected="key-value heads that divide the heads, and even widths",
            )
        return decoder

    @property
    def context_length(self) -> int:
        """Number of positions for which every runtime attends as the model does."""
        return self.positions if self.family.carries_windows else min(self.positions, self.window or self.positions)

    def with_widths(self, widths: Iterable[int]) -> "Decoder":
        """Return the decoder with other feed-forward widths, one for each layer."""
        return replace(self, intermediate=tuple(widths))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder layers."""
        return tuple(self.family.block(self, layer) for layer in range(self.layers))

    @cached_property
    def embedding(self) -> WeightGroup:
        """The table of embeddings; it is also the head if both are tied."""
        uses = ("embedding", "head") if self.tied else ("embedding",)
        site = HEAD_SITE if self.tied else TOKENS
        return WeightGroup(EMBEDDING, "embedding", None, self.vocab, self.hidden, uses, site)

    @cached_property
    def layer_embedding(self) -> tuple[WeightGroup, ...]:
        """The parts of the table with the inputs that a token has in each layer, side by side; empty for none."""
        width = self.layers * self.layer_input_width
        firsts = range(0, self.vocab if width else 0, ROWS_OF_A_PART)
        return tuple(
            WeightGroup(
                LAYER_EMBEDDING if len(firsts) == 1 else f"{LAYER_EMBEDDING}.{first}", "layer_embedding", None,
                min(ROWS_OF_A_PART, self.vocab - first), width, ("embedding",), TOKENS, first_row=first,
            )
            for first in firsts
        )  # fmt: skip

    @cached_property
    def before_layers(self) -> tuple[Vector, ...]:
        """The projection of the embedding to inputs of layers, and its norm; empty where layers have none."""
        width = self.layer_input_width
        if not width:
            return ()
        return (
            Vector("layer_projection", LAYER_PROJECTION, self.hidden, rows=self.layers * width),
            Vector("layer_projection_norm", LAYER_PROJECTION_NORM, width),
        )

    @cached_property
    def head(self) -> WeightGroup:
        """The matrix that makes the logits."""
        if self.tied:
            return self.embedding
        return WeightGroup(HEAD, "head", None, self.vocab, self.hidden, ("head",), HEAD_SITE)

    @cached_property
    def final_norm(self) -> Vector:
        """The norm before the head."""
        before = self.blocks[-1].sublayers[-1].norm_before
        name = f"model.{self.family.final_norm}.weight"
        return Vector("final_norm", name, self.hidden, 0.0 if before is None else before.offset)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Name -> site, of the sites of all blocks."""
        return {site.name: site for block in self.blocks for site in block.sites}

    @cached_property
    def last_sites(self) -> frozenset[str]:
        """Names of the sites at the ends of sublayers, but for those in experts."""
        ends = (sublayer.sites[-1] for block in self.blocks for sublayer in block.sublayers)
        return frozenset(site.name for site in ends if not site.routed)

    def linear(self, group: WeightGroup) -> Linear | None:
        """Return the matrix of a group; None for tables and the head."""
        return None if group.layer is None else self.blocks[group.layer].linears[group.part]

    @property
    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return sum(group.size for group in self.groups()) + sum(_size(shape) for shape in self.vectors().values())

    @property
    def active_parameters(self) -> int:
        """Number of weights that a token is computed with, on average; a token reaches some of the experts only."""
        return self.parameters - round(sum((1 - group.share) * group.size for group in self.groups()))

    @property
    def tables(self) -> tuple[WeightGroup, ...]:
        """The matrices whose rows are looked up by token; those of a role are parts of one table."""
        return (self.embedding, *self.layer_embedding)

    def groups(self) -> list[WeightGroup]:
        """Return the matrices in the order of the forward pass; the tables are first, an untied head last."""
        inside = [linear.group for block in self.blocks for linear in block.linears.values()]
        return [*self.tables, *inside, *([] if self.tied else [self.head])]

    def all_vectors(self) -> list[Vector]:
        """Return the tensors kept in float32 in the order in which files hold them."""
        return [*self.before_layers, *(vector for block in self.blocks for vector in block.vectors), self.final_norm]

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors kept in float32."""
        return {vector.name: vector.shape for vector in self.all_vectors()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors: matrices, and those kept in float32."""
        return {group.name: (group.rows, group.columns) for group in self.groups()} | self.vectors()

    @cached_property
    def stored_matrices(self) -> dict[str, tuple[WeightGroup, ...]]:
        """Name of each matrix of a checkpoint -> the matrices whose rows it holds, in order; most hold one."""
        found: dict[str, tuple[WeightGroup, ...]] = {}
        for group in self.groups():
            linear = self.linear(group)
            stored_in = None if linear is None else linear.stored_in
            name = LAYER_EMBEDDING if group in self.layer_embedding else stored_in or group.name
            found[name] = (*found.get(name, ()), group)
        return found

    def stored_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors of a checkpoint."""
        matrices = {
            name: (sum(group.rows for group in groups), groups[0].columns)
            for name, groups in self.stored_matrices.items()
        }
        return matrices | self.vectors()

    def check_shapes(self, held: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]], where: object) -> None:
        """Check the tensors of a source.

        Args:
            held: Name -> shape of its tensors.
            needed: `tensors()`, or `stored_tensors()` for a checkpoint.
            where: The source, for messages.

        Raises:
            InputError: a tensor is missing, has the wrong shape, or has no place in the architecture.
        """
        for name, shape in needed.items():
            if name not in held:
                raise InputError(f"the tensor {name} is missing", where=where, next_step="fetch the model again")
            if held[name] != shape:
                raise InputError(
                    "the tensor has the wrong shape",
                    where=f"{where}: {name}",
                    got=list(held[name]),
                    expected=list(shape),
                    next_step="check that config.json belongs to these weights",
                )
        known = {*needed, *self.family.unused(self), HEAD}
        extra = sorted(name for name in set(held) - known if not name.endswith(IGNORED_SUFFIXES))
        if extra:
            raise InputError(
                f"the model holds a tensor that a {self.family.architecture} does not use: {extra[0]}",
                where=where,
                got=f"{len(extra)} such tensors",
                expected="none, since leaving them out would change the model",
            )


def layer_prefix(layer: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
