"""Lines of POSIX shell, made of literal text and quoted words. A device runs nothing else."""

import shlex
from collections.abc import Sequence


class Line(str):
    """Text that is safe for a shell to read. Only `line` makes it, so all outside text in it is quoted."""

    __slots__ = ()


def line(text: str, *words: str | Sequence[str]) -> Line:
    """Return a shell line.

    Args:
        text: A literal, never assembled from parts, with `%s` for a word and `%%` for a percent sign.
        *words: The words: a `Line` is inserted unchanged, other text is quoted as one word, and a sequence of texts
            becomes one quoted word each.
    """
    return Line(text % tuple(map(_quoted, words)))


def _quoted(word: str | Sequence[str]) -> str:
    if isinstance(word, Line):
        return word
    return shlex.quote(word) if isinstance(word, str) else shlex.join(word)
