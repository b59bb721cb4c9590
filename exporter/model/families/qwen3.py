"""Qwen3: Llama's blocks with norms of queries and keys, head by head; windows by layer."""

from functools import partial

from exporter.model.attention_windows import windows_by_layer
from exporter.model.families.llama import GGUF_TENSORS, ONNX_NODES, block
from exporter.model.family import Family, GgufDeclaration, OnnxDeclaration

FAMILY = Family(
    model_type="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    block=partial(block, qk_norms=True),
    windows=windows_by_layer,
    gguf=GgufDeclaration("qwen3", GGUF_TENSORS),
    onnx=OnnxDeclaration("Qwen3Model", ONNX_NODES),
    only={"qk_norm": True, "use_qk_norm": True},
)
