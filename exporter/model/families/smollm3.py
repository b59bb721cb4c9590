"""SmolLM3: Llama's blocks, of which every fourth has no rotary embedding; windows by layer."""

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.attention_windows import FULL, Windows, windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, OnnxDeclaration, Refusal
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

# llama.cpp has the period built in.
PERIOD = 4


def windows(config: PretrainedConfig, where: object) -> Windows:
    """Return the window of each layer, None for none.

    Raises:
        InputError: config.json contradicts itself, or does not say which layers have rotary embeddings.
    """
    if len(config.no_rope_layers) < config.num_hidden_layers:
        raise InputError(
            "no_rope_layers does not name each layer", where=where, got=len(config.no_rope_layers),
            expected=config.num_hidden_layers,
        )  # fmt: skip
    return windows_by_layer(config, where)


def built_in(layers: int) -> list[int]:
    """Return for each layer whether llama.cpp rotates its queries and keys, as 0 or 1."""
    return [int((layer + 1) % PERIOD != 0) for layer in range(layers)]


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Add the layers without rotary embeddings to the config.json that a header gives."""
    config["no_rope_layers"] = built_in(config["num_hidden_layers"])


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse layers without rotary embeddings other than every fourth."""
    expected = built_in(shape.layers)
    if list(config.no_rope_layers)[: shape.layers] == expected:
        return None
    return Refusal("no_rope_layers", config.no_rope_layers, expected)


def shim(config: PretrainedConfig, original: PretrainedConfig) -> None:
    """Show the builder a kind for each layer, as it expects; no context exceeds a window, so none has one."""
    config.layer_types = [FULL] * config.num_hidden_layers


FAMILY = Family(
    model_type="smollm3",
    title="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    block=block,
    windows=windows,
    gguf=GgufDeclaration("smollm3", GGUF_TENSORS, interleaved_rotary=True, refusal=refusal, config=config_of),
    onnx=OnnxDeclaration("SmolLM3Model", ONNX_NODES, shim),
    honoured={"no_rope_layers": "layer numbers?", "no_rope_layer_interval": "layers?"},
)
