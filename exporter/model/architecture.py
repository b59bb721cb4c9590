"""The shape of a decoder, read from config.json, and the tensors it implies."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from exporter.formats.group import WeightGroup
from exporter.foundation.errors import InputError
from exporter.model.families import (
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    LINEARS,
    NORMS,
    Family,
    layer_tensor,
)

MAX_LAYERS = 512
MAX_WIDTH = 1 << 20
# Positions are int32 in the runtimes.
MAX_POSITIONS = (1 << 31) - 1
# Families in which `layer_types` gives each layer a window or none. In a Mistral, all layers have a window or none has.
WINDOWS_BY_LAYER = ("qwen2", "qwen3")
FULL, SLIDING = "full_attention", "sliding_attention"
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.masked_bias")


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder; names follow config.json where possible.

    Attributes:
        family: Maps roles to tensors.
        layers: Number of decoder layers.
        hidden: Width of the residual stream.
        intermediate: Feed-forward width of each decoder layer; pruning can make these differ.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        vocab: Rows of the embedding.
        tied: The embedding serves as the head.
        context_length: Number of positions for which every runtime attends as the model does: the model's maximum,
            or its sliding window if shorter (llama.cpp has no window for these families).
    """

    family: Family
    layers: int
    hidden: int
    intermediate: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context_length: int
    window: int | None = None

    @classmethod
    def of(cls, config: PretrainedConfig, where: object) -> "Architecture":
        """Read the architecture from a transformers config.

        Raises:
            InputError: the architecture is not supported, or a number is missing or impossible.
        """
        named = (config.architectures or [type(config).__name__.replace("Config", "ForCausalLM")])[0]
        if named not in FAMILIES:
            raise InputError(
                f"the architecture {named!r} is not supported", where=where, expected="one of " + ", ".join(FAMILIES)
            )
        for bias in ("mlp_bias", *(() if "q_bias" in FAMILIES[named].vectors else ("attention_bias",))):
            if getattr(config, bias, False):
                raise InputError(f"a {named} with {bias}=true is not supported", where=where, expected=f"{bias}=false")
        layers = _whole(config, "num_hidden_layers", where, MAX_LAYERS)
        heads = _whole(config, "num_attention_heads", where)
        hidden = _whole(config, "hidden_size", where)
        positions = _whole(config, "max_position_embeddings", where, MAX_POSITIONS)
        window = _window(config, where)
        architecture = cls(
            family=FAMILIES[named],
            layers=layers,
            hidden=hidden,
            intermediate=(_whole(config, "intermediate_size", where),) * layers,
            heads=heads,
            kv_heads=_whole(config, "num_key_value_heads", where, default=heads),
            head_dim=_whole(config, "head_dim", where, default=hidden // heads),
            vocab=_whole(config, "vocab_size", where),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            context_length=positions if window is None else window,
            window=window,
        )
        if heads % architecture.kv_heads or architecture.head_dim % 2:
            raise InputError(
                "the heads do not divide evenly",
                where=where,
                got=f"{heads} heads, {architecture.kv_heads} key-value heads, head width {architecture.head_dim}",
                expected="key-value heads that divide the heads and an even width",
            )
        return architecture

    @property
    def even(self) -> bool:
        """Whether all layers have the same feed-forward width."""
        return len(set(self.intermediate)) == 1

    @property
    def parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return sum(group.size for group in self.groups()) + sum(_size(shape) for shape in self.vectors().values())

    def groups(self) -> list[WeightGroup]:
        """Return the matrices in the order of the forward pass; the embedding is first, an untied head last."""
        uses = ("embedding", "head") if self.tied else ("embedding",)
        embedding_site = "head_in" if self.tied else "tokens"
        found = [WeightGroup(EMBEDDING, "embedding", None, self.vocab, self.hidden, uses, embedding_site)]
        for layer in range(self.layers):
            for role, (module, site) in LINEARS.items():
                rows, columns = self._linear_shape(role, layer)
                name = layer_tensor(layer, f"{module}.weight")
                found.append(WeightGroup(name, role, layer, rows, columns, (role,), f"layers.{layer}.{site}"))
        if not self.tied:
            found.append(WeightGroup(HEAD, "head", None, self.vocab, self.hidden, ("head",), "head_in"))
        return found

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors kept in float32: norms and biases."""
        widths = dict.fromkeys(NORMS, self.hidden) | {
            "q_norm": self.head_dim,
            "k_norm": self.head_dim,
            "q_bias": self.heads * self.head_dim,
            "k_bias": self.kv_heads * self.head_dim,
            "v_bias": self.kv_heads * self.head_dim,
        }
        found: dict[str, tuple[int, ...]] = {
            layer_tensor(layer, name): (widths[role],)
            for layer in range(self.layers)
            for role, name in self.family.vectors.items()
        }
        return found | {FINAL_NORM: (self.hidden,)}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors."""
        return {group.name: (group.rows, group.columns) for group in self.groups()} | self.vectors()

    def _linear_shape(self, role: str, layer: int) -> tuple[int, int]:
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        width = self.intermediate[layer]
        return {
            "q": (query, self.hidden),
            "k": (key, self.hidden),
            "v": (key, self.hidden),
            "o": (self.hidden, query),
            "gate": (width, self.hidden),
            "up": (width, self.hidden),
            "down": (self.hidden, width),
        }[role]

    def check_shapes(self, held: dict[str, tuple[int, ...]], where: object) -> None:
        """Check the tensors of a source against those the architecture needs.

        Raises:
            InputError: a tensor is missing, has the wrong shape, or has no place in the architecture.
        """
        needed = self.tensors()
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
        extra = sorted(name for name in set(held) - set(needed) - {HEAD} if not name.endswith(IGNORED_SUFFIXES))
        if extra:
            raise InputError(
                f"the model holds a tensor that a {self.family.architecture} does not use: {extra[0]}",
                where=where,
                got=f"{len(extra)} such tensors",
                expected="none, since leaving them out would change the model",
            )


def _window(config: PretrainedConfig, where: object) -> int | None:
    """Return the size of the sliding window if it is shorter than the model's maximum number of positions."""
    if not _has_window(config, where):
        return None
    window = _whole(config, "sliding_window", where, MAX_POSITIONS)
    return window if window < config.max_position_embeddings else None


def _has_window(config: PretrainedConfig, where: object) -> bool:
    """Return whether transformers gives some layer a sliding window."""
    window, kinds = getattr(config, "sliding_window", None), set(getattr(config, "layer_types", None) or [])
    by_layer = config.model_type in WINDOWS_BY_LAYER
    if not kinds <= ({FULL, SLIDING} if by_layer and window is not None else {FULL}):
        strange = ", ".join(sorted(kinds - {FULL}))
        raise InputError("layer_types names kinds of attention that do not go together with the rest of config.json",
                         where=where, got=strange, expected=FULL)  # fmt: skip
    if by_layer:
        return SLIDING in kinds
    # A Llama has no windows; conversions can leave these keys behind.
    unused = config.model_type == "llama" and getattr(config, "use_sliding_window", None) is False
    return window is not None and not unused


def _whole(config: PretrainedConfig, key: str, where: object, most: int = MAX_WIDTH, default: int | None = None) -> int:
    value = getattr(config, key, None)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(
            f"config.json has no usable {key!r}", where=where, got=value, expected=f"a whole number from 1 to {most}"
        )
    return value


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
