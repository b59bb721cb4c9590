"""OLMo 3: OLMo 2's block, with a window in three of four layers; scaled rotary embeddings in the others alone.

onnxruntime-genai's model builder knows only the first OLMo. Facts of llama.cpp are those of its `olmo2` graph in
llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping

from transformers import PretrainedConfig

from exporter.model.attention_windows import FULL, SLIDING, windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS
from exporter.model.families.olmo2 import block
from exporter.model.families.olmo2 import refusal as refused_of_olmo2
from exporter.model.family import Family, GgufDeclaration, HeaderValue, Refusal
from exporter.model.shape import Shape


def header_keys(shape: Shape, config: PretrainedConfig) -> Mapping[str, HeaderValue]:
    """Return the keys of windows, of which llama.cpp expects none where no layer has one."""
    if SLIDING not in config.layer_types:
        return {}
    return {
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == SLIDING for kind in config.layer_types],
    }


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
    gguf=GgufDeclaration("olmo2", GGUF_TENSORS, square_queries=True, keys=header_keys, refusal=refusal),
    carries_windows=True,
    rotary_kinds=(FULL, SLIDING),
)
