"""The prompt that speed and memory are measured with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Generated after the prompt, one at a time.
DECODE_TOKENS = 32


def prompt_for(tokens: NDArray[Any], context: int) -> list[int]:
    """Return token ids that fill a context but for those that are generated after them.

    Args:
        tokens: Windows of tokens; they are read again where they are fewer: speed does not depend on what is read.
        context: Tokens of context.
    """
    filled: list[int] = np.resize(tokens, context - DECODE_TOKENS - 1).tolist()
    return filled
