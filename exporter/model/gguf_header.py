"""The keys of one architecture in the header of a GGUF file."""

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.foundation.errors import InputError
from exporter.model.gguf_file import GgufFile

HF_FOLDER = "give the model as a Hugging Face folder"


@dataclass(frozen=True)
class Header:
    """The keys of an architecture in one file."""

    file: GgufFile
    architecture: str

    def require(self, key: str, accepted: list[Any]) -> None:
        """Reject a value that is not accepted; `key` includes its prefix.

        Raises:
            InputError: see above.
        """
        value = self.file.value(key)
        if value is None or any(_equal(value, one) for one in accepted):
            return
        raise InputError(
            f"{key} changes what the model computes, in a way that is not supported",
            where=self.file.path,
            got=shown_value(value),
            expected=" or ".join([*(shown_value(one) for one in accepted), "no such key"]),
            next_step=HF_FOLDER,
        )

    def refused(self, key: str, reason: str, got: object, expected: object) -> InputError:
        """Return the error for a key whose value cannot be honoured, with the reason after its name."""
        return InputError(
            f"{self.architecture}.{key} {reason}", where=self.file.path, got=got, expected=expected, next_step=HF_FOLDER
        )

    def text(self, key: str, default: str) -> str:
        """Return the text of a key."""
        value = self.file.value(f"{self.architecture}.{key}")
        return default if value is None else self._usable(key, value, isinstance(value, str), "a text")

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number; the file may hold it as a list with the same number for each layer."""
        value = self.file.value(f"{self.architecture}.{key}")
        value = default if value is None else value
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        usable = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        found: int = self._usable(key, value, usable, "a whole number, the same for all layers")
        return found

    def whole_by_layer(self, key: str, layers: int, default: int | None = None) -> list[int]:
        """Return a whole number for each layer; the file may hold a single one for all."""
        value = self.file.value(f"{self.architecture}.{key}")
        if not isinstance(value, list):
            return [self.whole(key, default)] * layers
        usable = len(value) == layers and all(type(one) is int and one >= 0 for one in value)
        return list(self._usable(key, value, usable, f"a whole number for each of {layers} layers"))

    def flag(self, key: str, default: bool) -> bool:
        """Return a flag."""
        value = self.file.value(f"{self.architecture}.{key}")
        return default if value is None else bool(self._usable(key, value, isinstance(value, bool), "a flag"))

    def flags(self, key: str, layers: int, period: int) -> list[bool]:
        """Return a flag for each layer: those of a key, or of its period, after which the one layer without it comes.

        Args:
            key: The key.
            layers: Number of layers.
            period: What llama.cpp assumes where there is no such key.
        """
        value = self.file.value(f"{self.architecture}.{key}")
        if isinstance(value, list):
            usable = len(value) >= layers and all(isinstance(flag, bool) for flag in value)
            return list(self._usable(key, value, usable, "a flag for each layer")[:layers])
        period = self.whole(key, period)
        return [period == 0 or layer % period < period - 1 for layer in range(layers)]

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number, as the shortest decimal of its float32."""
        value = self.file.value(f"{self.architecture}.{key}")
        value = default if value is None else value
        usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        return float(str(np.float32(self._usable(key, value, usable, "a finite number"))))

    def _usable(self, key: str, value: Any, usable: bool, expected: str) -> Any:
        if not usable:
            raise InputError(
                f"the GGUF file has no usable '{self.architecture}.{key}'",
                where=self.file.path,
                got=shown_value(value),
                expected=expected,
            )
        return value


def _equal(value: Any, accepted: Any) -> bool:
    return isinstance(value, bool) is isinstance(accepted, bool) and value == accepted


def shown_value(value: Any) -> str:
    """Return a value as messages show it."""
    return reprlib.repr(value)
