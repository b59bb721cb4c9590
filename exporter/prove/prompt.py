"""The prompt for measurements of speed and memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens generated after the prompt, one at a time.
DECODE_TOKENS = 32


def prompt_for(tokens: NDArray[Any], context: int) -> list[int]:
    """Return token ids that fill a context, with room for the tokens generated after them.

    Args:
        tokens: Windows of tokens; they are repeated if there are too few, since speed does not depend on the text.
        context: Tokens of context.
    """
    filled: list[int] = np.resize(tokens, context - DECODE_TOKENS - 1).tolist()
    return filled
