"""The tree of errors, grouped by what the user must do about them.

    ExporterError            70  a bug in the exporter
    ├── CheckError            1  a check of accuracy or of the device failed
    ├── RequestError          2  the request cannot work as stated: change the command
    │   └── MissingDependencyError   install the named library
    ├── InputError            3  the model, text or bundle is bad: change the input
    └── RuntimeCrashError    70  a runtime died in its child process
        └── DeadlineError        it was killed after a timeout

Each message is one printable sentence: where, what failed, what was got, what was expected, the next step.
"""

import re
from collections.abc import Iterable

# Characters that control a terminal, or that hide or reorder the text around them: C0 and C1 control characters,
# Unicode's direction marks and overrides, its line separators, and lone surrogates.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: object, kept: str = "") -> str:
    """Return a text that is safe for a terminal, with control characters escaped as in JSON.

    Args:
        text: Any untrusted text.
        kept: Characters to keep unescaped, such as line ends.
    """

    def escaped(found: re.Match[str]) -> str:
        sign = found[0]
        return sign if sign in kept else SHORT.get(sign, f"\\u{ord(sign):04x}")

    return UNPRINTABLE.sub(escaped, str(text))


class ExporterError(Exception):
    """An error with a message that a user can act upon.

    Args:
        what: The failure, without a full stop.
        where: The file, tensor, layer or option it concerns.
        got: The value found.
        expected: The value expected.
        next_step: Advice for the user.
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
            # `got` may be another error's sentence.
            sentence += f"; got {str(got).removesuffix('.')}"
        if expected is not None:
            sentence += f", expected {expected}" if got is not None else f"; expected {expected}"
        if next_step is not None:
            sentence += f"; {next_step}"
        # A message from a child process already ends with a full stop.
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
    """A runtime was killed in its child process after a timeout."""


def did_you_mean(wrong: str, known: Iterable[str], most: int = 100) -> str:
    """Return the next step for an unknown name: the nearest known name, and at most `most` of all known names."""
    from difflib import get_close_matches  # here, since child processes start faster without it

    names = sorted(known)
    by_case = {name.casefold(): name for name in names}
    near = get_close_matches(wrong.casefold(), by_case, n=1, cutoff=0.6)
    listed = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return f"did you mean {by_case[near[0]]!r}? Known: {listed}" if near else f"known: {listed}"
