"""Rotary embeddings as in transformers: the frequencies, and the scale factor of the cosines and sines.

Families with two kinds of attention have `rope_parameters` for each; all others have one for all layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exporter.formats.format import Float32
from exporter.foundation.errors import InputError
from exporter.model.attention_windows import FULL, SLIDING
from exporter.model.limits import MAX_POSITIONS

# Pairs have the frequencies of a whole head; those beyond a part of it stay as they are.
PROPORTIONAL = "proportional"


def rope_parameters(config: PretrainedConfig, attention: str = FULL) -> Mapping[str, Any]:
    """Return the parameters of the rotary embeddings of layers with a kind of attention."""
    parameters: Mapping[str, Any] = config.rope_parameters
    found: Mapping[str, Any] = parameters[attention] if FULL in parameters else parameters
    return found


def rotary_kind(config: PretrainedConfig, attention: str = FULL) -> str:
    """Return the kind of rotary embedding; `default` means no scaling."""
    kind: str = rope_parameters(config, attention)["rope_type"]
    return kind


def rotary_frequencies(config: PretrainedConfig, attention: str = FULL) -> tuple[Float32, float]:
    """Return the rotation angle of each pair per position, float32 [rotary width / 2], and the factor of both tables.

    For `dynamic` these hold up to `max_position_embeddings`; its scaling begins beyond. For `longrope` they hold up to
    `unchanged_until`.
    """
    kind = rotary_kind(config, attention)
    if kind == "default":
        return plain_frequencies(config, attention).numpy(), 1.0
    layer_type = attention if FULL in config.rope_parameters else None
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=layer_type)
    return frequencies.numpy(), float(factor)


def plain_frequencies(config: PretrainedConfig, attention: str = FULL) -> torch.Tensor:
    """Return the unscaled frequencies, float32 [rotary width / 2]."""
    width = rotary_width(config, head_width(config, attention), attention)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return torch.as_tensor(1.0 / (rope_parameters(config, attention)["rope_theta"] ** exponents))


def head_width(config: PretrainedConfig, attention: str) -> int:
    """Return the width of a head in layers with a kind of attention."""
    # transformers has a config for each layer where these differ.
    own = config.per_layer_config[config.layer_types.index(attention)] if config.is_heterogeneous else config
    width: int = getattr(own, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def rotary_width(config: PretrainedConfig, head_dim: int, attention: str = FULL) -> int:
    """Return the number of a head's channels that are turned; the first ones are.

    `proportional` turns all, many of them by an angle of zero.
    """
    if rotary_kind(config, attention) == PROPORTIONAL:
        return head_dim
    return int(head_dim * (rope_parameters(config, attention).get("partial_rotary_factor") or 1.0))


def unchanged_until(config: PretrainedConfig) -> int:
    """Return the longest text for which every position has the rotary embedding that it has in a shorter text.

    `longrope` has other frequencies for longer texts. Runtimes choose them by the size of the cache or by the position,
    not by the length of the text as the model does (ggml-org/llama.cpp issue 24823).
    """
    if rotary_kind(config) != "longrope":
        return MAX_POSITIONS
    original: int = rope_parameters(config)["original_max_position_embeddings"]
    return original


def rotary_notes(config: PretrainedConfig) -> tuple[str, ...]:
    """Return notes on rotary embeddings that change with the length of a text."""
    kind = rotary_kind(config)
    if kind == "longrope":
        limit, most = unchanged_until(config), config.max_position_embeddings
        if limit >= most:
            return ()
        return (
            f"the model turns all positions by other angles in texts of {limit + 1} to {most} positions (longrope), "
            f"which runtimes do otherwise: the artifact is made for {limit}",
        )
    if kind != "dynamic":
        return ()
    beyond = f"beyond {config.max_position_embeddings} positions"
    return (f"the model scales its rotary embeddings {beyond}, which the artifact, made for no more, never does",)


def check_rotary(config: PretrainedConfig, where: object) -> None:
    """Reject parameters that do not give finite positive frequencies.

    Raises:
        InputError: see above.
    """
    kinds = (FULL, SLIDING) if FULL in config.rope_parameters else (FULL,)
    for attention in kinds:
        # transformers has no widths of heads for a kind without layers.
        if not config.is_heterogeneous or attention in config.layer_types:
            _check_rotary(config, attention, where)


def _check_rotary(config: PretrainedConfig, attention: str, where: object) -> None:
    try:
        frequencies, factor = rotary_frequencies(config, attention)
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError("the rotary embeddings cannot be computed", where=where, got=repr(error)) from error
    turned = frequencies[frequencies != 0] if rotary_kind(config, attention) == PROPORTIONAL else frequencies
    if not (turned.size and np.isfinite(turned).all() and (turned > 0).all() and 0 < factor < np.inf):
        raise InputError(
            "the rotary embeddings cannot be computed",
            where=where,
            got=f"frequencies from {frequencies.min()} to {frequencies.max()} and a factor of {factor}",
            expected="positive numbers",
        )
