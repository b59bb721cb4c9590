"""Limits of the numbers in a config.json."""

from transformers import PretrainedConfig

from exporter.foundation.errors import InputError

MAX_LAYERS = 512
MAX_WIDTH = 1 << 20
MAX_EXPERTS = 1024
# Positions are int32 in the runtimes.
MAX_POSITIONS = (1 << 31) - 1


def whole_number(
    config: PretrainedConfig, key: str, where: object, most: int = MAX_WIDTH, default: int | None = None
) -> int:
    """Return a positive whole number of a config.

    Raises:
        InputError: it is missing and has no default, or it is not a whole number from 1 to `most`.
    """
    value = getattr(config, key, None)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise InputError(
            f"config.json has no usable {key!r}", where=where, got=value, expected=f"a whole number from 1 to {most}"
        )
    return value
