"""Llama, and the description of a block that families like it share."""

from collections.abc import Mapping
from types import MappingProxyType

from exporter.formats.group import WeightGroup
from exporter.model.attention_windows import no_window
from exporter.model.blocks import Block, GatedChannels, Linear, Producer, Site, Sublayer, Vector
from exporter.model.family import Family, GgufDeclaration, OnnxDeclaration
from exporter.model.shape import Shape

GGUF_TENSORS = MappingProxyType(
    {
        "q": "attn_q.weight",
        "k": "attn_k.weight",
        "v": "attn_v.weight",
        "o": "attn_output.weight",
        "gate": "ffn_gate.weight",
        "up": "ffn_up.weight",
        "down": "ffn_down.weight",
        "attention_norm": "attn_norm.weight",
        "mlp_norm": "ffn_norm.weight",
        "attention_after_norm": "post_attention_norm.weight",
        "mlp_after_norm": "post_ffw_norm.weight",
        "q_norm": "attn_q_norm.weight",
        "k_norm": "attn_k_norm.weight",
        "q_bias": "attn_q.bias",
        "k_bias": "attn_k.bias",
        "v_bias": "attn_v.bias",
    }
)
MODULES = MappingProxyType(
    {role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")}
    | {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
    | {"router": "mlp.gate"}
)
ONNX_NODES = MappingProxyType(
    {role: f"attn/{role}_proj" for role in ("q", "k", "v", "o")}
    | {role: f"mlp/{role}_proj" for role in ("gate", "up", "down")}
)


def block(shape: Shape, layer: int, qk_norms: bool = False, qkv_biases: bool = False) -> Block:
    """Return a block of attention and a gated feed-forward part, each behind a norm.

    Args:
        shape: Sizes of the shape.
        layer: Index of the layer.
        qk_norms: Queries and keys are normalised head by head.
        qkv_biases: Queries, keys and values have biases.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    part = BlockParts(shape, layer)
    norms = [part.norm("attention_norm", "input_layernorm"), part.norm("mlp_norm", "post_attention_layernorm")]
    more = [part.vector(f"{role}_norm", f"self_attn.{role}_norm.weight", shape.head_dim) for role in "qk"]
    biases = [
        part.vector(f"{role}_bias", f"self_attn.{role}_proj.bias", width)
        for role, width in zip("qkv", (query, key, key), strict=True)
    ]
    return Block(
        layer,
        (
            part.attention("input_layernorm", norms[0], v_biases=biases[2:] if qkv_biases else ()),
            part.feed_forward("post_attention_layernorm", norms[1]),
        ),
        (*norms, *(more if qk_norms else ()), *(biases if qkv_biases else ())),
    )


class BlockParts:
    """Describes the parts of a layer.

    Args:
        shape: Sizes of the shape.
        layer: Index of the layer.
        offset: Added to what the checkpoint stores of norms.
        modules: Role of a matrix -> path of its module within the layer.
    """

    def __init__(self, shape: Shape, layer: int, offset: float = 0.0, modules: Mapping[str, str] = MODULES) -> None:
        self._shape, self._layer, self._offset, self._modules = shape, layer, offset, modules

    def norm(self, role: str, module: str, width: int | None = None) -> Vector:
        """Return the gain of a norm, as wide as the residual stream unless said otherwise."""
        return self.vector(role, f"{module}.weight", width or self._shape.hidden, self._offset)

    def vector(self, role: str, name: str, width: int, offset: float = 0.0) -> Vector:
        """Return a vector of the layer."""
        return Vector(role, self._name(name), width, offset)

    def kernel(self, role: str, module: str, positions: int) -> Vector:
        """Return the kernel of a depthwise convolution of the residual stream's width."""
        return Vector(role, self._name(f"{module}.weight"), self._shape.hidden, kernel=positions)

    def attention(
        self,
        entrance: str,
        before: Vector | None,
        after: Vector | None = None,
        v_biases: "tuple[Vector, ...] | list[Vector]" = (),
        stored_in: str | None = None,
        values_normed: bool = False,
    ) -> Sublayer:
        """Return the attention: queries, keys and values of one input, then the output projection.

        A layer that attends to the keys and values of another has queries alone.

        Args:
            entrance: See `Sublayer`.
            before: The norm before it.
            after: The norm after it.
            v_biases: The biases of the values.
            stored_in: Module that holds queries, keys and values together; None if each has its own.
            values_normed: Values are normalised, so that nothing may absorb a division of the attention's outputs.
        """
        shape = self._shape
        width, own = shape.head_dims[self._layer], shape.key_layers[self._layer] is None
        query, key = shape.heads * width, shape.kv_heads * width
        rows = (("q", query, shape.heads), *((("k", key, shape.kv_heads), ("v", key, 0)) if own else ()))
        given = [
            self._linear(role, count, shape.hidden, "attention_in", heads, stored_in) for role, count, heads in rows
        ]
        o = self._linear("o", shape.hidden, query, "attention_out")
        values = None if values_normed or not own else Producer(tuple(v_biases), given[-1], by_heads=True)
        sites = (
            self._site("attention_in", tuple(given), _norm_as_producer(before)),
            self._site("attention_out", (o,), values),
        )
        return Sublayer(entrance, sites, before, after, residual_scale=shape.residual_scale)

    def feed_forward(
        self, entrance: str, before: Vector | None, after: Vector | None = None, stored_in: str | None = None
    ) -> Sublayer:
        """Return the feed-forward part: down(act(gate x) * up x); `stored_in` holds gate and up together."""
        hidden, width = self._shape.hidden, self._shape.intermediate[self._layer]
        gate, up = (self._linear(role, width, hidden, "mlp_in", stored_in=stored_in) for role in ("gate", "up"))
        down = self._linear("down", hidden, width, "mlp_out")
        sites = (
            self._site("mlp_in", (gate, up), _norm_as_producer(before)),
            self._site("mlp_out", (down,), Producer(linear=up)),
        )
        channels = GatedChannels(gate, up, down)
        return Sublayer(entrance, sites, before, after, channels, self._shape.residual_scale)

    def convolution(self, entrance: str, before: Vector, kernel: Vector) -> Sublayer:
        """Return a gated short convolution: out(c * conv(b * x)), where b, c and x are the rows of `conv_in`, in order.

        `conv` sums the last few positions of each channel with the weights of `kernel`, and is linear: its kernel may
        absorb a division of what `conv_out` takes.
        """
        hidden = self._shape.hidden
        entering = self._linear("conv_in", 3 * hidden, hidden, "conv_in")
        leaving = self._linear("conv_out", hidden, hidden, "conv_out")
        sites = (
            self._site("conv_in", (entering,), _norm_as_producer(before)),
            self._site("conv_out", (leaving,), Producer((kernel,))),
        )
        return Sublayer(entrance, sites, before, residual_scale=self._shape.residual_scale)

    def layer_input(self, entrance: str, after: Vector) -> Sublayer:
        """Return what adds a layer's own input of the token: projection(act(gate x) * input)."""
        hidden, width = self._shape.hidden, self._shape.layer_input_width
        gate = self._linear("input_gate", width, hidden, "layer_input_in")
        projection = self._linear("input_projection", hidden, width, "layer_input_out")
        sites = (self._site("layer_input_in", (gate,), None), self._site("layer_input_out", (projection,), None))
        return Sublayer(entrance, sites, norm_after=after)

    def experts(self, entrance: str, before: Vector) -> Sublayer:
        """Return experts, each a gated feed-forward part, and the router that chooses some of them for each token.

        The norm before them may not absorb a division: every expert would have to take it.
        """
        hidden, experts = self._shape.hidden, self._shape.experts
        assert experts is not None
        router = self._linear("router", experts.count, hidden, "mlp_in", exact=True)
        sites = [self._site("mlp_in", (router,), None)]
        for number in range(experts.count):
            gate, up = (self._expert(f"expert_{role}", number, experts.width, hidden, "in") for role in ("gate", "up"))
            down = self._expert("expert_down", number, hidden, experts.width, "out")
            sites += [
                self._site(f"{number}.expert_in", (gate, up), None),
                self._site(f"{number}.expert_out", (down,), None),
            ]
        return Sublayer(entrance, tuple(sites), before, residual_scale=self._shape.residual_scale)

    def _expert(self, role: str, number: int, rows: int, columns: int, end: str) -> Linear:
        experts = self._shape.experts
        assert experts is not None
        name = self._name(f"mlp.experts.{number}.{role.removeprefix('expert_')}_proj.weight")
        group = WeightGroup(
            name, role, self._layer, rows, columns, (role,), f"layers.{self._layer}.{number}.expert_{end}",
            number, experts.used / experts.count,
        )  # fmt: skip
        return Linear(group, f"mlp.experts.{number}.{role}")

    def _linear(
        self,
        role: str,
        rows: int,
        columns: int,
        site: str,
        heads: int = 0,
        stored_in: str | None = None,
        exact: bool = False,
    ) -> Linear:
        module, place = self._modules[role], f"layers.{self._layer}.{site}"
        name = self._name(f"{module}.weight")
        group = WeightGroup(name, role, self._layer, rows, columns, (role,), place, exact=exact)
        if stored_in is None:
            return Linear(group, module, heads)
        return Linear(group, f"{stored_in}.{role}", heads, self._name(f"{stored_in}.weight"))

    def _name(self, name: str) -> str:
        return f"model.layers.{self._layer}.{name}"

    def _site(self, kind: str, linears: tuple[Linear, ...], producer: Producer | None) -> Site:
        return Site(f"layers.{self._layer}.{kind}", linears, producer)


def _norm_as_producer(norm: Vector | None) -> Producer | None:
    """Return the norm before a site as what may absorb a division; nothing may where the site is the stream itself."""
    return None if norm is None else Producer((norm,))


FAMILY = Family(
    model_type="llama",
    title="Llama 2 and 3, TinyLlama, SmolLM, SmolLM2, DeepSeek-R1-Distill-Llama",
    architecture="LlamaForCausalLM",
    block=block,
    windows=no_window,
    gguf=GgufDeclaration(
        "llama",
        GGUF_TENSORS,
        interleaved_rotary=True,
        rotary=("default", "linear", "dynamic", "yarn", "llama3"),
        with_widths="deci",
    ),
    onnx=OnnxDeclaration("LlamaModel", ONNX_NODES),
)
