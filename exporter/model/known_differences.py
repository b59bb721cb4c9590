"""Texts to which a runtime is known to give other ids than the model's tokenizer; they are set apart and reported."""

from collections.abc import Callable, Mapping

from tokenizers import Regex, normalizers

Reason = Callable[[str], str | None]


def matching(reasons: Mapping[str, str]) -> Reason:
    """Return a function that gives the reason of the first pattern found in a text, or None.

    Args:
        reasons: Regular expression of the tokenizers library (it knows Unicode's properties) -> reason.
    """
    removers = [(normalizers.Replace(Regex(pattern), ""), reason) for pattern, reason in reasons.items()]

    def reason_of(text: str) -> str | None:
        return next((reason for remover, reason in removers if remover.normalize_str(text) != text), None)

    return reason_of


def first_of(*functions: Reason) -> Reason:
    """Return a function that gives the first reason that any of the functions gives, or None."""
    return lambda text: next((reason for function in functions if (reason := function(text))), None)
