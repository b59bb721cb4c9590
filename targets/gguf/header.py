"""The header of a GGUF file: a decoder's hyperparameters, without tensors and vocabulary."""

import math

import gguf
import numpy as np
from transformers import PretrainedConfig

from exporter.formats.format import Float32
from exporter.model.architecture import Architecture
from exporter.model.rotary import rotary_frequencies, rotary_kind


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
    _write_rope(writer, config)
    if architecture.window is not None:
        writer.add_sliding_window(architecture.window)


def _write_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    parameters, kind = config.rope_parameters, rotary_kind(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(_attention_factor(config))


def _attention_factor(config: PretrainedConfig) -> float:
    """Return llama.cpp's factor for cosines and sines, in addition to the factor from YaRN's paper."""
    _, factor = rotary_frequencies(config)
    return factor / (1 + 0.1 * math.log(max(1.0, config.rope_parameters["factor"])))


def frequency_factors(config: PretrainedConfig, head_dim: int) -> dict[str, Float32]:
    """Return the tensor by which llama.cpp divides rotary frequencies for `llama3` scaling, if any."""
    if rotary_kind(config) != "llama3":
        return {}
    scaled, _ = rotary_frequencies(config)
    plain = config.rope_parameters["rope_theta"] ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return {"rope_freqs.weight": (plain / scaled.astype(np.float64)).astype(np.float32)}


def finish_header(writer: gguf.GGUFWriter) -> None:
    """Write the keys and the list of tensors; the tensors' data follows them."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
