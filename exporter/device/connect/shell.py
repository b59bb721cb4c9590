"""Lines of POSIX shell: a text of ours, and words that are quoted. A device runs nothing else."""

import shlex
from collections.abc import Sequence


class Line(str):
    """Text that a shell may read as it stands. Only `line` makes it, so that nothing from outside is in it unquoted."""

    __slots__ = ()


def line(text: str, *words: str | Sequence[str]) -> Line:
    """Return a line of shell.

    Args:
        text: A literal, never put together from parts, with `%s` where a word goes and `%%` for a percent sign.
        *words: What goes there: a `Line` as it is; any other text quoted, as one word; a sequence of texts as a word
            each.
    """
    return Line(text % tuple(map(_quoted, words)))


def _quoted(word: str | Sequence[str]) -> str:
    if isinstance(word, Line):
        return word
    return shlex.quote(word) if isinstance(word, str) else shlex.join(word)
