"""Parity of tokenizer and chat template: a runtime must feed the model what transformers feeds it."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from exporter.errors import ExporterError, RequestError
from exporter.measures import Check, Status
from exporter.model.tokenizer import Chat

T = TypeVar("T")
SHOWN = 16


def check_tokenizer(
    texts: Sequence[str],
    expected_ids: Callable[[str], list[int]],
    got_ids: Callable[[str], list[int]],
    runtime: str,
    known_difference: Callable[[str], str | None] = lambda _: None,
) -> Check:
    """Compare the token ids of every text.

    Args:
        texts: Such as `exporter.model.tokenizer.parity_texts`.
        expected_ids: The model's own tokenizer.
        got_ids: The runtime's tokenizer. A RequestError means that the runtime has none.
        runtime: Name of the runtime, the last part of the check's name.
        known_difference: Why a runtime must differ on a text, or None. Such a text is counted apart and named in
            the detail; it neither passes nor fails.

    Returns:
        The check `parity.tokenizer.<runtime>`; its value is the number of texts that differ without a known reason.
    """
    reasons = [reason for text in texts if (reason := known_difference(text))]
    compared = [text for text in texts if not known_difference(text)]
    check = _check(f"parity.tokenizer.{runtime}", "texts", compared, expected_ids, got_ids)
    if not reasons:
        return check
    apart = f"{len(reasons)} texts set apart: {'; '.join(dict.fromkeys(reasons))}"
    return check.model_copy(update={"detail": f"{check.detail}; {apart}"})


def check_chat_template(
    chats: Sequence[Chat],
    expected: Callable[[Chat], str | None],
    got: Callable[[Chat], str | None],
    runtime: str,
) -> Check:
    """Compare every chat as rendered; None stands for a chat that the template refuses, which both must.

    Returns:
        The check `parity.chat_template.<runtime>`; its value is the number of chats that differ.
    """
    return _check(f"parity.chat_template.{runtime}", "chats", chats, expected, got)


def _check(
    name: str, noun: str, items: Sequence[T], expected: Callable[[T], object], got: Callable[[T], object]
) -> Check:
    """Compare item by item; what cannot be asked is not run, what the runtime fails at has failed."""
    if not items:
        return Check(name=name, status="not run", detail=f"there are no {noun} to compare")
    try:
        differences = list(_differences(items, expected, got))
    except RequestError as error:
        return Check(name=name, status="not run", detail=str(error))
    except ExporterError as error:
        return Check(name=name, status="failed", detail=str(error))
    status: Status = "failed" if differences else "passed"
    detail = f"{len(items) - len(differences)} of {len(items)} {noun} equal"
    if differences:
        detail += f"; first difference: {differences[0]}"
    return Check(name=name, status=status, detail=detail, value=len(differences), limit=0, unit=noun)


def _differences(items: Iterable[T], expected: Callable[[T], object], got: Callable[[T], object]) -> Iterable[str]:
    for item in items:
        right, actual = expected(item), got(item)
        if right != actual:
            yield _describe(item, right, actual)


def _describe(item: object, right: object, actual: object) -> str:
    """Show both values from shortly before the place where they part."""
    if not isinstance(right, str | list) or not isinstance(actual, str | list):
        return f"{item!r:.80}: got {actual!r:.80}, expected {right!r:.80}"
    same = next(
        (i for i, (a, b) in enumerate(zip(right, actual, strict=False)) if a != b), min(len(right), len(actual))
    )
    start = max(0, same - 2)
    shown = slice(start, start + SHOWN)
    return f"{item!r:.80}: from position {start} got {actual[shown]!r}, expected {right[shown]!r}"
