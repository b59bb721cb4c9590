"""Qwen2 and Qwen2.5: Llama's blocks with biases of queries, keys and values; windows by layer."""

from functools import partial

from exporter.model.attention_windows import windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, OnnxDeclaration

FAMILY = Family(
    model_type="qwen2",
    title="Qwen1.5, Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen",
    architecture="Qwen2ForCausalLM",
    block=partial(block, qkv_biases=True),
    windows=windows_by_layer,
    gguf=GgufDeclaration("qwen2", GGUF_TENSORS, square_queries=True),
    onnx=OnnxDeclaration("QwenModel", ONNX_NODES),
    refused_flags=("mlp_bias",),
    only={"qkv_bias": True},
)
