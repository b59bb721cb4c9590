"""What a family of decoders declares: its blocks, the keys of its config.json, and what targets need to know of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.foundation.registry import load, names
from exporter.model.attention_windows import FULL, no_window
from exporter.model.blocks import Block
from exporter.model.limits import MAX_POSITIONS, whole_number
from exporter.model.shape import Experts, Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

PACKAGE = "exporter.model.families"
# The value of a key in the header of a GGUF file; its type follows from Python's.
HeaderValue = bool | int | float | str | list[bool] | list[int]


def no_scale(config: PretrainedConfig) -> float:
    """Return 1."""
    return 1.0


def no_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return no keys."""
    return {}


def unchanged(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Change nothing."""


def as_read(config: PretrainedConfig) -> None:
    """Change nothing."""


def attention_only(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return None for each layer: none has a convolution."""
    layers: int = config.num_hidden_layers
    return (None,) * layers


def one_width(config: PretrainedConfig, where: object) -> tuple[int, ...]:
    """Return 1 for each layer: all feed-forward parts are as wide as config.json states."""
    layers: int = config.num_hidden_layers
    return (1,) * layers


def one_head_width(config: PretrainedConfig, where: object) -> tuple[int, ...]:
    """Return the width of a head, the same for each layer."""
    heads = whole_number(config, "num_attention_heads", where)
    width = whole_number(config, "head_dim", where, default=whole_number(config, "hidden_size", where) // heads)
    layers: int = config.num_hidden_layers
    return (width,) * layers


def own_keys(config: PretrainedConfig, where: object) -> tuple[int | None, ...]:
    """Return None for each layer: all attend to keys and values of their own."""
    layers: int = config.num_hidden_layers
    return (None,) * layers


def no_layer_inputs(config: PretrainedConfig, where: object) -> int:
    """Return 0."""
    return 0


def nothing_unused(shape: Shape) -> Collection[str]:
    """Return no names."""
    return ()


def no_cap(config: PretrainedConfig) -> float | None:
    """Return None."""


@dataclass(frozen=True)
class Refusal:
    """Why a runtime does not compute a model as transformers does.

    Attributes:
        key: The key of config.json.
        got: Its value.
        expected: The value that the runtime computes.
    """

    key: str
    got: object
    expected: object


def every_position(config: PretrainedConfig) -> int:
    """Return a number of positions that no model exceeds."""
    return MAX_POSITIONS


def as_it_is(config: dict[str, Any], header: "Header") -> None:
    """Change nothing."""


def no_experts(config: PretrainedConfig, where: object) -> Experts | None:
    """Return None."""


def always(config: PretrainedConfig) -> bool:
    """Return True."""
    return True


def nothing_refused(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Return None."""


@dataclass(frozen=True)
class GgufDeclaration:
    """How llama.cpp knows a family.

    Attributes:
        architecture: `general.architecture` of a file.
        tensors: Role -> name within `blk.N`, of matrices and vectors. A norm's file holds its gain, offset included.
        activations: Values of `hidden_act` that llama.cpp's graph of this architecture computes.
        interleaved_rotary: llama.cpp rotates neighbouring rows of a head, so query and key rows are reordered.
        rotary: Kinds of rotary embedding that its graph computes.
        square_queries: Its heads must together be as wide as the residual stream.
        final_norm: Name of the gain of the norm before the head.
        outside: Role -> name, of the table and the projection that make inputs of layers.
        with_widths: An architecture that computes the same, with a feed-forward width for each layer; None for none.
        keys: Returns the keys of the header besides those of every decoder, without the architecture's prefix.
        refusal: Returns what its graph has built in that this model has otherwise; None for nothing.
        most_lowering_kl: How far a file in float32 may be from the model, in nats, where the graph rounds more than
            sums in another order do; None where it does not.
        config: Changes the config.json that the header of a file gives, where the family has other keys than Llama.
    """

    architecture: str
    tensors: Mapping[str, str]
    activations: Sequence[str] = ("silu", "swish")
    interleaved_rotary: bool = False
    rotary: Sequence[str] = ("default", "linear", "dynamic", "yarn")
    square_queries: bool = False
    final_norm: str = "output_norm.weight"
    outside: Mapping[str, str] = field(default_factory=dict)
    with_widths: str | None = None
    keys: Callable[[Shape, PretrainedConfig], Mapping[str, HeaderValue]] = no_keys
    refusal: Callable[[Shape, PretrainedConfig], Refusal | None] = nothing_refused
    config: Callable[[dict[str, Any], "Header"], None] = as_it_is
    most_lowering_kl: float | None = None


@dataclass(frozen=True)
class OnnxDeclaration:
    """How onnxruntime-genai's model builder knows a family.

    Attributes:
        builder: Name of its class in `onnxruntime_genai.models.builders`.
        nodes: Role -> path of a matrix's node within its layer.
        shim: Changes a config that the builder is shown, given the original, so that it builds this family right.
        runtime_type: Name of a family with the same inputs and outputs, for a runtime that does not know this one's.
        positions: Returns the most positions for which the builder's graph computes the model.
    """

    builder: str
    nodes: Mapping[str, str]
    shim: Callable[[PretrainedConfig, PretrainedConfig], None] = unchanged
    runtime_type: str | None = None
    positions: Callable[[PretrainedConfig], int] = every_position


# Names as in transformers' classes that are made like Llava: today's, and those of its files, which are older.
TEXT_PREFIXES = MappingProxyType(
    {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "lm_head.": "lm_head.",
    }
)
VISION = ("vision_tower.*", "multi_modal_projector.*", "model.vision_tower.*", "model.multi_modal_projector.*")


@dataclass(frozen=True)
class Multimodal:
    """A published form of a family: the decoder beside an encoder of images, which is left out.

    Attributes:
        model_type: `model_type` of the whole in config.json.
        architecture: Class name of the whole in config.json's `architectures`.
        inert: Names and patterns of keys of config.json that concern what is left out.
        text_key: The key of config.json that holds the decoder's own config.
        prefixes: What the names of the decoder's tensors begin with -> what they begin with in a decoder alone.
        left_out: Patterns of the names of all other tensors.
    """

    model_type: str
    architecture: str
    inert: Sequence[str]
    text_key: str = "text_config"
    prefixes: Mapping[str, str] = field(default_factory=lambda: TEXT_PREFIXES)
    left_out: Sequence[str] = VISION

    def leaves_out(self, name: str) -> bool:
        """Return whether a tensor is of what is left out."""
        return any(fnmatchcase(name, pattern) for pattern in self.left_out)


@dataclass(frozen=True)
class Family:
    """One family of decoders; it is a file of `exporter.model.families`.

    Attributes:
        model_type: `model_type` in config.json.
        title: Names of its models, as people know them.
        architecture: Class name in config.json's `architectures`.
        block: Returns the description of a layer.
        windows: Returns the attention window of each layer, None for none; it raises an `InputError`, which names the
            place given, if config.json contradicts itself.
        gguf: What the target `gguf` and the reader of GGUF files need.
        onnx: What the ONNX targets need; None for a family that they do not build.
        carries_windows: The targets attend within the windows as the model does. Otherwise the artifact's context is
            no longer than the shortest window.
        embedding_scale: Returns the factor of embeddings before the first block.
        residual_scale: Returns the factor of what sublayers add to the residual stream.
        logits_divisor: Returns what the head's outputs are divided by.
        logits_cap: Returns the cap of logits, or None; see `Shape.logits_cap`.
        experts: Returns the experts of each layer, or None; it raises an `InputError` as `windows` does.
        rotates: Returns whether queries and keys have rotary embeddings.
        convolutions: Returns the kernel, in positions, of the short convolution that a layer has in place of attention,
            None for a layer of attention; it raises an `InputError` as `windows` does.
        head_dims: Returns the width of a head in each layer; it raises an `InputError` as `windows` does.
        key_layers: Returns the layer whose keys and values each layer attends to, None for its own; it raises an
            `InputError` as `windows` does.
        width_factors: Returns the feed-forward width of each layer as a multiple of the one that config.json states; it
            raises an `InputError` as `windows` does.
        layer_input_width: Returns the width of what each layer is given of a token besides the residual stream; it
            raises an `InputError` as `windows` does.
        normalise: Changes a config that was just read so that `intermediate_size` is the width of the feed-forward
            parts, where it follows from several keys.
        final_norm: Path, within the base model, of the norm before the head.
        rotary_kinds: Kinds of attention with rotary embeddings of their own, in the order of the builder's tables.
        rotary_honoured: Keys of `rope_parameters` that change what it computes, besides those of each type: key -> kind
            of value. A key whose kind does not allow null must be there.
        rotary_names: Other names that its config.json has for types of rotary embedding -> their usual name.
        width_key: The key of config.json that states the width of feed-forward parts.
        epsilon_key: The key of config.json for what norms add to the mean square.
        activation_key: The key of config.json that names the activation; None for a family that has SiLU built in.
        refused_flags: Keys of config.json that would add biases which the blocks do not have.
        honoured: Keys of config.json that change what it computes, besides those of every family: key -> kind of value.
        only: Keys that the family has built in, and the one value that changes nothing.
        inert: Names and patterns of keys that change nothing, whatever their value, besides those of every family.
        multimodal: A form in which models of the family are published beside an encoder of images; None for none.
        adopted_code: Values of `auto_map` in published models, whose code or tokenizer transformers has built in since.
        unused: Returns the names of tensors that a checkpoint may hold although the model computes nothing with them.
    """

    model_type: str
    title: str
    architecture: str
    block: Callable[[Shape, int], Block]
    windows: Callable[[PretrainedConfig, object], tuple[int | None, ...]]
    gguf: GgufDeclaration
    onnx: OnnxDeclaration | None = None
    carries_windows: bool = False
    embedding_scale: Callable[[PretrainedConfig], float] = no_scale
    residual_scale: Callable[[PretrainedConfig], float] = no_scale
    logits_divisor: Callable[[PretrainedConfig], float] = no_scale
    logits_cap: Callable[[PretrainedConfig], float | None] = no_cap
    experts: Callable[[PretrainedConfig, object], Experts | None] = no_experts
    rotates: Callable[[PretrainedConfig], bool] = always
    convolutions: Callable[[PretrainedConfig, object], tuple[int | None, ...]] = attention_only
    head_dims: Callable[[PretrainedConfig, object], tuple[int, ...]] = one_head_width
    key_layers: Callable[[PretrainedConfig, object], tuple[int | None, ...]] = own_keys
    width_factors: Callable[[PretrainedConfig, object], tuple[int, ...]] = one_width
    layer_input_width: Callable[[PretrainedConfig, object], int] = no_layer_inputs
    normalise: Callable[[PretrainedConfig], None] = as_read
    final_norm: str = "norm"
    rotary_kinds: Sequence[str] = (FULL,)
    rotary_honoured: Mapping[str, str] = field(default_factory=dict)
    rotary_names: Mapping[str, str] = field(default_factory=dict)
    width_key: str = "intermediate_size"
    epsilon_key: str = "rms_norm_eps"
    activation_key: str | None = "hidden_act"
    refused_flags: Sequence[str] = ("mlp_bias", "attention_bias")
    honoured: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    inert: Sequence[str] = ()
    multimodal: Multimodal | None = None
    adopted_code: Sequence[str] = ()
    unused: Callable[[Shape], Collection[str]] = nothing_unused

    @property
    def usable_context(self) -> str:
        """What the longest text is that every artifact computes as the model does, for the user."""
        limits = []
        if not self.carries_windows and self.windows is not no_window:
            limits.append("attention window")
        if "longrope" in self.gguf.rotary:
            limits.append("longrope's original context")
        return f"full, or the {' or '.join(limits)} if the model has one" if limits else "full"

    @property
    def base_model(self) -> str:
        """Class name of the model without its head."""
        return self.architecture.removesuffix("ForCausalLM") + "Model"


@cache
def families() -> dict[str, Family]:
    """Return class name -> family, of every family."""
    known = names(PACKAGE)
    found: list[Family] = [load(f"{PACKAGE}.{{}}", name, known, "family").FAMILY for name in known]
    return {family.architecture: family for family in found}
