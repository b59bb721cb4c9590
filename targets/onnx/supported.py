"""Refuses decoders that ONNX Runtime's operators do not compute, before a weight is read."""

from exporter.foundation.errors import RequestError
from exporter.model.decoder import Decoder
from exporter.model.family import OnnxDeclaration
from exporter.model.model import Model

# GroupQueryAttention refuses a rotary table whose rows, half a head wide, are no multiple of 8.
HEAD_WIDTHS = 16


def declared_by(decoder: Decoder) -> OnnxDeclaration:
    """Return what a decoder's family declares for this target.

    Raises:
        RequestError: onnxruntime-genai's model builder does not know the family.
    """
    family = decoder.family
    if family.onnx is None:
        raise RequestError(
            "onnxruntime-genai's model builder does not build this family", where=family.architecture,
            next_step="use --target gguf",
        )  # fmt: skip
    return family.onnx


def context_length(model: Model) -> int:
    """Return the number of positions for which the graph computes what the model does."""
    return min(model.decoder.context_length, declared_by(model.decoder).positions(model.config))


def runtime_type(decoder: Decoder) -> str:
    """Return the name of a decoder's family in genai_config.json."""
    return declared_by(decoder).runtime_type or decoder.family.model_type


def require_supported(model: Model) -> None:
    """Refuse a model that ONNX Runtime cannot run.

    Activations and rotary embeddings need no check: the builder writes every activation that is read, and the rotary
    tables are transformers' own.

    Raises:
        RequestError: the model is refused; the message names the property, the limit and a target without it.
    """
    declared_by(model.decoder)
    width = model.decoder.rotary_width
    if width % HEAD_WIDTHS:
        raise RequestError(
            "ONNX Runtime's attention turns certain widths of heads only", where="head_dim", got=width,
            expected=f"a multiple of {HEAD_WIDTHS}", next_step="use --target gguf, which takes any even width",
        )  # fmt: skip
