"""The attention window of each layer, as the keys of config.json give it in families of several kinds."""

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError
from exporter.model.limits import MAX_POSITIONS, whole_number

FULL, SLIDING = "full_attention", "sliding_attention"
Windows = tuple[int | None, ...]


def windows_by_layer(config: PretrainedConfig, where: object) -> Windows:
    """Return the windows of a family in which `layer_types` gives each layer a window or none."""
    window = getattr(config, "sliding_window", None)
    kinds = list(getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers)
    _require_kinds(kinds, {FULL, SLIDING} if window is not None else {FULL}, where)
    if SLIDING not in kinds:
        return (None,) * len(kinds)
    given = whole_number(config, "sliding_window", where, MAX_POSITIONS)
    return tuple(given if kind == SLIDING else None for kind in kinds)


def one_window(config: PretrainedConfig, where: object) -> Windows:
    """Return the windows of a family in which all layers have the same window, or none has."""
    _require_kinds(getattr(config, "layer_types", None) or [], {FULL}, where)
    layers: int = config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None:
        return (None,) * layers
    return (whole_number(config, "sliding_window", where, MAX_POSITIONS),) * layers


def no_window(config: PretrainedConfig, where: object) -> Windows:
    """Return the windows of a family that has none; conversions can leave the keys of another family behind."""
    layers: int = config.num_hidden_layers
    if getattr(config, "use_sliding_window", None) is False:
        _require_kinds(getattr(config, "layer_types", None) or [], {FULL}, where)
        return (None,) * layers
    return one_window(config, where)


def _require_kinds(kinds: list[str], known: set[str], where: object) -> None:
    if not set(kinds) <= known:
        raise InputError(
            "layer_types names kinds of attention that do not go together with the rest of config.json",
            where=where, got=", ".join(sorted(set(kinds) - {FULL})), expected=FULL,
        )  # fmt: skip
