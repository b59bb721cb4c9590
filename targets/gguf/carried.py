"""What of a decoder llama.cpp computes as transformers does; all else is refused before a weight is read."""

import numpy as np
from transformers import PretrainedConfig

from exporter.errors import RequestError
from exporter.model.model import Model
from exporter.model.rotary import rotary_frequencies, rotary_kind
from exporter.weights.format import Float32

# The graphs of these architectures have it built in; both names mean x * sigmoid(x).
ACTIVATIONS = ("silu", "swish")
# Architectures that read a tensor of frequency factors, which llama3's scaling is written as.
WITH_FACTORS = ("llama",)
# Architectures whose query matrix is square: the heads are together as wide as the residual stream.
SQUARE = ("qwen2",)
ELSEWHERE = "use --target onnx, which computes it"
# Turns within the original context where YaRN begins and ends to slow pairs down. llama.cpp takes these for all
# families here, also where a file states others, and rounds the range.
BETA_FAST, BETA_SLOW = 32.0, 1.0
# Both compute in float32.
SAME_FREQUENCY = 1e-4


def require_carried(model: Model) -> None:
    """Refuse a model that llama.cpp would compute otherwise, or not load.

    Raises:
        RequestError: see above; the property, the limit and a target without it are named.
    """
    shape, config = model.architecture, model.config
    family = shape.family.gguf_architecture
    if config.hidden_act not in ACTIVATIONS:
        raise RequestError(
            "llama.cpp has the activation of the feed-forward parts built in", where="hidden_act",
            got=repr(config.hidden_act), expected="'silu'", next_step=ELSEWHERE,
        )  # fmt: skip
    if rotary_kind(config) == "llama3" and family not in WITH_FACTORS:
        raise RequestError(
            f"llama.cpp's {family!r} has no rotary embeddings of type 'llama3'", where="rope_parameters",
            got="'llama3'", expected="'default', 'linear', 'dynamic' or 'yarn'", next_step=ELSEWHERE,
        )  # fmt: skip
    if rotary_kind(config) == "yarn" and not _same(
        llama_cpp_yarn(config, shape.head_dim), rotary_frequencies(config)[0]
    ):
        raise RequestError(
            "llama.cpp slows other pairs down with YaRN than this model", where="rope_parameters",
            got=_yarn_keys(config), expected=f"beta_fast {BETA_FAST:g}, beta_slow {BETA_SLOW:g}, truncate true",
            next_step=ELSEWHERE,
        )  # fmt: skip
    if family in SQUARE and shape.heads * shape.head_dim != shape.hidden:
        raise RequestError(
            f"llama.cpp's {family!r} reads heads that are together as wide as the hidden state", where="head_dim",
            got=f"{shape.heads} heads of {shape.head_dim}, hidden size {shape.hidden}", expected="equal widths",
            next_step=ELSEWHERE,
        )  # fmt: skip


def llama_cpp_yarn(config: PretrainedConfig, head_dim: int) -> Float32:
    """Return the frequencies that llama.cpp computes of YaRN's factor and original context, float32 [head width / 2].

    This is `ggml_rope_yarn_corr_dims` and `rope_yarn` of ggml, with all of the mix that llama.cpp asks for.
    """
    parameters = config.rope_parameters
    base, factor, original = (parameters[key] for key in ("rope_theta", "factor", "original_max_position_embeddings"))
    first, last = (
        head_dim * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (BETA_FAST, BETA_SLOW)
    )
    low, high = max(0, np.floor(first)), min(head_dim - 1, np.ceil(last))
    ramp = 1 - np.clip((np.arange(head_dim // 2) - low) / max(0.001, high - low), 0, 1)
    plain = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    mixed: Float32 = (plain / factor * (1 - ramp) + plain * ramp).astype(np.float32)
    return mixed


def _yarn_keys(config: PretrainedConfig) -> str:
    keys = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate")
    return ", ".join(f"{key} {config.rope_parameters[key]}" for key in keys if key in config.rope_parameters).lower()


def _same(one: Float32, other: Float32) -> bool:
    return bool(np.allclose(one, other, rtol=SAME_FREQUENCY, atol=0))
