"""The tree of errors, by what the user must do about them.

    ExporterError            70  a fault of ours
    ├── CheckError            1  a check of accuracy or of the device failed
    ├── RequestError          2  the request cannot work as stated: change the command
    │   └── MissingDependencyError   install what is named
    ├── InputError            3  the model, text or bundle is bad: change the input
    └── RuntimeCrashError    70  a runtime died in its child process
        └── DeadlineError        it was ended, since it took too long

Each message is one sentence: where, what failed, what was got, what was expected, the next step. It is printable.
"""

import re
from collections.abc import Iterable

# What a terminal obeys, or what hides or turns the text around it: control characters, C1 too, Unicode's marks and
# overrides of direction, its separators of lines, and halves of surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: object, kept: str = "") -> str:
    """Return a text as a terminal may have it: what is not printed but obeyed is escaped, as JSON escapes it.

    Args:
        text: Any text, from anybody.
        kept: Characters that stay as they are, such as line ends.
    """

    def escaped(found: re.Match[str]) -> str:
        sign = found[0]
        return sign if sign in kept else SHORT.get(sign, f"\\u{ord(sign):04x}")

    return UNPRINTABLE.sub(escaped, str(text))


class ExporterError(Exception):
    """An error whose message a user can act upon.

    Args:
        what: What failed, without a full stop.
        where: The file, tensor, layer or option it concerns.
        got: What was found.
        expected: What would have been right.
        next_step: What the user can do now.
    """

    exit_code = 70

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        next_step: str | None = None,
    ) -> None:
        sentence = what if where is None else f"{where}: {what}"
        if got is not None:
            # What another sentence said may be part of this one.
            sentence += f"; got {str(got).removesuffix('.')}"
        if expected is not None:
            sentence += f", expected {expected}" if got is not None else f"; expected {expected}"
        if next_step is not None:
            sentence += f"; {next_step}"
        # A message that came through a pipe from a child process ends with its stop already.
        super().__init__(printable(sentence).removesuffix(".") + ".")


class CheckError(ExporterError):
    """A check of accuracy or of the device failed."""

    exit_code = 1


class RequestError(ExporterError):
    """The request cannot work as stated."""

    exit_code = 2


class MissingDependencyError(RequestError):
    """An optional library is not installed."""


class InputError(ExporterError):
    """A model, text, profile or bundle is damaged or of an unsupported kind."""

    exit_code = 3


class RuntimeCrashError(ExporterError):
    """A runtime died in its child process."""


class DeadlineError(RuntimeCrashError):
    """A runtime was ended in its child process, since it took too long."""


def did_you_mean(wrong: str, known: Iterable[str], most: int = 100) -> str:
    """Return the next step for a name that is not known: the nearest name, and at most so many of those there are."""
    from difflib import get_close_matches  # here, for child processes start sooner without it

    names = sorted(known)
    by_case = {name.casefold(): name for name in names}
    near = get_close_matches(wrong.casefold(), by_case, n=1, cutoff=0.6)
    listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"did you mean {by_case[near[0]]!r}? Known: {listed}" if near else f"known: {listed}"
