"""The header of a GGUF file: what llama.cpp must know of a decoder besides its tensors and vocabulary."""

from typing import Any

import gguf
import numpy as np
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporter.errors import RequestError
from exporter.model.architecture import Architecture
from exporter.weights.format import Float32

# rope_type in config.json -> whether llama.cpp reads it; "llama3" becomes a tensor of frequency factors.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary parameters of a transformers config.

    Raises:
        RequestError: llama.cpp has no such kind of rotary embedding.
    """
    parameters = dict(config.rope_parameters or {})
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise RequestError(
            f"rotary embeddings of type {kind!r} cannot be written to GGUF", expected="one of " + ", ".join(ROPE_TYPES)
        )
    return parameters


def write_header(writer: gguf.GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> None:
    """Add the hyperparameters that llama.cpp reads for this family."""
    writer.add_block_count(architecture.layers)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.hidden)
    widths = architecture.intermediate
    writer.add_feed_forward_length(widths[0] if architecture.even else widths)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(architecture.vocab)
    writer.add_rope_dimension_count(architecture.head_dim)
    parameters = rope(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def frequency_factors(config: PretrainedConfig, head_dim: int) -> dict[str, Float32]:
    """Return the tensor by which llama.cpp divides rotary frequencies for `llama3` scaling, if there is one."""
    parameters = rope(config)
    if parameters.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = parameters["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return {"rope_freqs.weight": (plain / scaled.double().numpy()).astype(np.float32)}


def finish_header(writer: gguf.GGUFWriter) -> None:
    """Write keys and the list of tensors, after which the tensors' data follows."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
