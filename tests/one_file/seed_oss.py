"""Seed-OSS: Llama's blocks with biases of queries, keys and values; llama.cpp names the second norm otherwise."""

from functools import partial

from exporter.model.attention_windows import no_window
from exporter.model.families.llama import GGUF_TENSORS, block
from exporter.model.family import Family, GgufDeclaration

FAMILY = Family(
    model_type="seed_oss",
    title="Seed-OSS",
    architecture="SeedOssForCausalLM",
    block=partial(block, qkv_biases=True),
    windows=no_window,
    gguf=GgufDeclaration("seed_oss", GGUF_TENSORS | {"mlp_norm": "post_attention_norm.weight"}),
    refused_flags=("mlp_bias", "attention_out_bias"),
)
