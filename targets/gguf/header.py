"""The header of a GGUF file: a decoder's hyperparameters, without tensors and vocabulary."""

import math

import gguf
import numpy as np
from transformers import PretrainedConfig

from exporter.formats.format import Float32
from exporter.model.decoder import Decoder
from exporter.model.family import HeaderValue
from exporter.model.rotary import PROPORTIONAL, rope_parameters, rotary_frequencies, rotary_kind

# What llama.cpp divides a frequency by so that no position turns the pair.
STILL = np.float32(1e30)


def write_header(writer: gguf.GGUFWriter, decoder: Decoder, config: PretrainedConfig) -> None:
    """Add the hyperparameters that llama.cpp reads for this family."""
    writer.add_block_count(decoder.layers)
    writer.add_context_length(decoder.context_length)
    writer.add_embedding_length(decoder.hidden)
    widths = decoder.intermediate
    writer.add_feed_forward_length(widths[0] if decoder.one_width else widths)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(_key_value_heads(decoder))
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_layer_norm_rms_eps(getattr(config, decoder.family.epsilon_key))
    writer.add_vocab_size(decoder.vocab)
    writer.add_rope_dimension_count(decoder.rotary_width)
    _write_rope(writer, config)
    if decoder.window is not None and not decoder.family.carries_windows:
        writer.add_sliding_window(decoder.window)
    for key, value in decoder.family.gguf.keys(decoder, config).items():
        _add(writer, f"{writer.arch}.{key}", value)


def _key_value_heads(decoder: Decoder) -> int | list[int]:
    """Return the number of key-value heads; one for each layer if some are convolutions, which llama.cpp knows by 0."""
    if decoder.attention_layers == decoder.layers:
        return decoder.kv_heads
    return [decoder.kv_heads if kernel is None else 0 for kernel in decoder.convolutions]


def _add(writer: gguf.GGUFWriter, key: str, value: HeaderValue) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _write_rope(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    parameters, kind = rope_parameters(config), rotary_kind(config)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(_attention_factor(config))
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rotary_frequencies(config)[1])


def _attention_factor(config: PretrainedConfig) -> float:
    """Return llama.cpp's factor for cosines and sines, in addition to the factor from YaRN's paper."""
    _, factor = rotary_frequencies(config)
    return factor / (1 + 0.1 * math.log(max(1.0, rope_parameters(config)["factor"])))


def frequency_factors(config: PretrainedConfig, width: int) -> dict[str, Float32]:
    """Return the tensors by which llama.cpp divides rotary frequencies, if any.

    Args:
        config: The transformers config.
        width: Number of a head's channels that are turned.
    """
    parameters, kind = rope_parameters(config), rotary_kind(config)
    if kind == "longrope":
        return {
            f"rope_factors_{length}.weight": np.asarray(parameters[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if kind == PROPORTIONAL:
        turned, _ = rotary_frequencies(config)
        return {"rope_freqs.weight": np.where(turned > 0, np.float32(1), STILL)}
    if kind != "llama3":
        return {}
    scaled, _ = rotary_frequencies(config)
    plain = parameters["rope_theta"] ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    return {"rope_freqs.weight": (plain / scaled.astype(np.float64)).astype(np.float32)}


def finish_header(writer: gguf.GGUFWriter) -> None:
    """Write the keys and the list of tensors; the tensors' data follows them."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
