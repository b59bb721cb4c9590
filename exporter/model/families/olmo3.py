"""OLMo 3: OLMo 2's block, with a window in three of four layers; scaled rotary embeddings in the others alone.

onnxruntime-genai's model builder knows only the first OLMo. Facts of llama.cpp are those of its `olmo2` graph in
llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from exporter.model.attention_windows import FULL, SLIDING, windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS
from exporter.model.families.olmo2 import block
from exporter.model.families.olmo2 import refusal as refused_of_olmo2
from exporter.model.family import Family, GgufDeclaration, HeaderValue, Refusal
from exporter.model.shape import Shape

if TYPE_CHECKING:
    from exporter.model.gguf_header import Header

# llama.cpp's default: every fourth layer has no window.
PERIOD = 4


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of windows, of which llama.cpp expects none where no layer has one."""
    if SLIDING not in config.layer_types:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in config.layer_types],
    }


def config_of(config: dict[str, Any], header: "Header") -> None:
    """Change the config.json that a header gives: windows by layer, and scaled rotary embeddings in the others alone.

    Raises:
        InputError: layers with a window have another base, which llama.cpp does not compute.
    """
    rope = config["rope_parameters"]
    base = header.number("rope.freq_base_swa", rope["rope_theta"])
    if base != rope["rope_theta"]:
        raise header.refused(
            "rope.freq_base_swa",
            "is not rope.freq_base, which llama.cpp takes for all layers",
            base,
            rope["rope_theta"],
        )
    windowed = header.flags("attention.sliding_window_pattern", config["num_hidden_layers"], PERIOD)
    config["layer_types"] = [SLIDING if one else FULL for one in windowed]
    config["rope_parameters"] = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": base}}


def refusal(shape: Shape, config: PretrainedConfig) -> Refusal | None:
    """Refuse a tied head, and a second base of rotary embeddings: llama.cpp has one for all layers."""
    full, sliding = (config.rope_parameters[kind]["rope_theta"] for kind in (FULL, SLIDING))
    if SLIDING in config.layer_types and sliding != full:
        return Refusal(f"rope_theta of {SLIDING}", sliding, full)
    return refused_of_olmo2(shape, config)


FAMILY = Family(
    model_type="olmo3",
    title="OLMo 3",
    architecture="Olmo3ForCausalLM",
    block=block,
    windows=windows_by_layer,
    gguf=GgufDeclaration(
        "olmo2", GGUF_TENSORS, square_queries=True, keys=header_keys, refusal=refusal, config=config_of
    ),
    carries_windows=True,
    rotary_kinds=(FULL, SLIDING),
)
