"""Refuses decoders that llama.cpp does not compute as transformers does, before a weight is read."""

from transformers import PretrainedConfig

from exporter.foundation.errors import RequestError
from exporter.model.gguf_rope import BETA_FAST, BETA_SLOW, same_yarn
from exporter.model.model import Model
from exporter.model.rotary import rope_parameters, rotary_kind

ELSEWHERE, NOWHERE = "use --target onnx, which computes it", "no target computes it"


def require_supported(model: Model) -> None:
    """Refuse a model that llama.cpp would compute differently or not load.

    Raises:
        RequestError: the model is refused; the message names the property, the limit and a target without it.
    """
    shape, config = model.decoder, model.config
    declared, activation_key = shape.family.gguf, shape.family.activation_key
    family, elsewhere = declared.architecture, ELSEWHERE if shape.family.onnx else NOWHERE
    if shape.activation not in declared.activations:
        raise RequestError(
            "llama.cpp has the activation of the feed-forward parts built in", where=activation_key,
            got=repr(shape.activation), expected=repr(declared.activations[0]), next_step=elsewhere,
        )  # fmt: skip
    if rotary_kind(config) not in declared.rotary:
        kind = repr(rotary_kind(config))
        raise RequestError(
            f"llama.cpp's {family!r} has no rotary embeddings of type {kind}", where="rope_parameters",
            got=kind, expected="one of " + ", ".join(declared.rotary), next_step=elsewhere,
        )  # fmt: skip
    if rotary_kind(config) == "yarn" and not same_yarn(config, shape.head_dim):
        raise RequestError(
            "llama.cpp slows other pairs down with YaRN than this model", where="rope_parameters",
            got=_yarn_keys(config), expected=f"beta_fast {BETA_FAST:g}, beta_slow {BETA_SLOW:g}, truncate true",
            next_step=elsewhere,
        )  # fmt: skip
    if declared.square_queries and shape.heads * shape.head_dim != shape.hidden:
        raise RequestError(
            f"llama.cpp's {family!r} reads heads that are together as wide as the hidden state", where="head_dim",
            got=f"{shape.heads} heads of {shape.head_dim}, hidden size {shape.hidden}", expected="equal widths",
            next_step=elsewhere,
        )  # fmt: skip
    refused = declared.refusal(shape, config)
    if refused is not None:
        raise RequestError(
            f"llama.cpp's {family!r} has another value built in", where=refused.key, got=refused.got,
            expected=refused.expected, next_step=elsewhere,
        )  # fmt: skip


def _yarn_keys(config: PretrainedConfig) -> str:
    keys = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
    given = rope_parameters(config)
    return ", ".join(f"{key} {given[key]}" for key in keys if key in given).lower()
