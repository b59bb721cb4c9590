"""Refuses decoders that ONNX Runtime's operators do not compute, before a weight is read."""

from exporter.foundation.errors import RequestError
from exporter.model.decoder import Decoder
from exporter.model.family import Family, OnnxDeclaration, every_position
from exporter.model.model import Model

# GroupQueryAttention refuses a rotary table whose rows, half a head wide, are no multiple of 8.
HEAD_WIDTHS = 16
NOT_BUILT = "onnxruntime-genai's model builder does not build this family"


def declared_by(decoder: Decoder) -> OnnxDeclaration:
    """Return what a decoder's family declares for this target.

    Raises:
        RequestError: onnxruntime-genai's model builder does not know the family.
    """
    family = decoder.family
    if family.onnx is None:
        raise RequestError(NOT_BUILT, where=family.architecture, next_step="use --target gguf")
    return family.onnx


def lacking(family: Family) -> str | None:
    """Return why no model of a family can be built; None if it can."""
    return NOT_BUILT if family.onnx is None else None


def limited_by(family: Family) -> str | None:
    """Return what limits the context besides what limits it in every target."""
    limited = family.onnx is not None and family.onnx.positions is not every_position
    return "the original context of its rotary embeddings" if limited else None


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
