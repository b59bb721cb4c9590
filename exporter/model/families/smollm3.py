"""SmolLM3: Llama's blocks, of which every fourth has no rotary embedding; windows by layer.

onnxruntime-genai's model builder rotates those layers, too.
"""

from transformers import PretrainedConfig

from exporter.model.attention_windows import windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS, block
from exporter.model.family import Family, GgufDeclaration, Refusal
from exporter.model.shape import Shape

# llama.cpp has the period built in.
PERIOD = 4


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse layers without rotary embeddings other than every fourth."""
    expected = [int((layer + 1) % PERIOD != 0) for layer in range(shape.layers)]
    if list(config.no_rope_layers)[: shape.layers] == expected:
        return None
    return Refusal("no_rope_layers", config.no_rope_layers, expected)


FAMILY = Family(
    model_type="smollm3",
    title="SmolLM3",
    architecture="SmolLM3ForCausalLM",
    block=block,
    windows=windows_by_layer,
    gguf=GgufDeclaration("smollm3", GGUF_TENSORS, interleaved_rotary=True, refusal=refusal),
    honoured={"no_rope_layers": "ids?", "no_rope_layer_interval": "layers?"},
)
