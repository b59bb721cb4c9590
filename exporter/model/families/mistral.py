"""Mistral: Llama's blocks; one attention window for all layers, or none."""

from exporter.model.attention_windows import one_window
from exporter.model.families.llama import FAMILY as LLAMA
from exporter.model.families.llama import ONNX_NODES, block
from exporter.model.family import Family, OnnxDeclaration

FAMILY = Family(
    model_type="mistral",
    title="Mistral 7B",
    architecture="MistralForCausalLM",
    block=block,
    windows=one_window,
    gguf=LLAMA.gguf,
    onnx=OnnxDeclaration("MistralModel", ONNX_NODES),
)
