"""Parity of tokenizer and chat template: a runtime must feed the model the same as the model's own ones do."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from exporter.foundation.errors import ExporterError, RequestError, RuntimeCrashError
from exporter.foundation.quantities import Check, Status
from exporter.model.chat import Chat, Render, Taken, as_taken

T = TypeVar("T")
SHOWN = 16
# Two renderings of a template that writes the time differ if a second, or a day, ends between them.
CLOCK_TRIES = 3


def check_tokenizer(
    texts: Sequence[str],
    expected_ids: Callable[[str], list[int]],
    got_ids: Callable[[str], list[int]],
    runtime: str,
    known_difference: Callable[[str], str | None] = lambda _: None,
) -> Check:
    """Compare the token ids of every text.

    Args:
        texts: Texts, such as `exporter.model.tokenizer.parity_texts`.
        expected_ids: The model's own tokenizer.
        got_ids: The runtime's tokenizer. A RequestError means that the runtime has none.
        runtime: Name of the runtime, the last part of the check's name.
        known_difference: Why a runtime may differ on a text, or None. Such a text is compared, too, but neither passes
            nor fails: the detail counts these texts, with their reasons and the first of them that differs.

    Returns:
        The check `parity.tokenizer.<runtime>`; its value is the number of texts that differ without a known reason.
    """
    known = {text: reason for text in texts if (reason := known_difference(text))}

    def difference(text: str) -> str | None:
        return _difference(text, expected_ids(text), got_ids(text))

    name = f"parity.tokenizer.{runtime}"
    check = _check(name, "texts", [text for text in texts if text not in known], difference)
    if not known or check.status == "not run":
        return check
    apart = [text for text in texts if text in known]
    reasons = "; ".join(dict.fromkeys(known.values()))
    alone = _check(name, "texts", apart, difference)
    said = f"{len(apart)} of {len(texts)} texts set apart: {reasons}; of these {alone.detail}"
    return check.model_copy(update={"detail": f"{check.detail}; {said}"})


def check_chat_template(
    chats: Sequence[Chat], expected: Render, got: Render, runtime: str, clock: bool = False
) -> Check:
    """Compare every chat as rendered, in the form that the template accepts; both must refuse the same chats.

    Args:
        chats: Chats, such as `exporter.model.chat.PARITY_CHATS`.
        expected: The template as transformers renders it.
        got: The template as the runtime renders it. A RequestError means that the runtime has none.
        runtime: Name of the runtime, the last part of the check's name.
        clock: The template may write the time: differing chats are rendered again, at the same time.

    Returns:
        The check `parity.chat_template.<runtime>`; its value is the number of chats that differ. It is not run if the
        template refuses all chats, or does not end.
    """
    name = f"parity.chat_template.{runtime}"
    try:
        taken = [as_taken(expected, chat) for chat in chats]
    except RuntimeCrashError as error:
        return Check(name=name, status="not run", detail=str(error))
    refused = [one for one in taken if one.rendered.text is None]
    if taken and len(refused) == len(taken):
        reason = refused[0].rendered.reason
        return Check(name=name, status="not run", detail=f"the template refuses all {len(taken)} chats: {reason}")

    def difference(one: Taken) -> str | None:
        right, actual = one.rendered, got(one.chat)
        for _ in range(CLOCK_TRIES if clock else 0):
            if right.text != actual.text:
                right, actual = expected(one.chat), got(one.chat)
        if actual.text is None and right.text is not None:
            return f"{one.chat!r:.80}: refused: {actual.reason}"
        return _difference(one.chat, right.text, actual.text)

    check = _check(name, "chats", [one for one in taken if one not in refused], difference)
    if check.status != "passed" or not refused:
        return check.model_copy(update={"detail": check.detail + _forms(taken)})
    alone = _check(name, "chats that the template refuses", refused, difference)
    said = f"{check.detail}{_forms(taken)}; the template refuses {len(refused)} others: {refused[0].rendered.reason}"
    if alone.status == "passed":
        return check.model_copy(update={"detail": said})
    return alone.model_copy(update={"detail": f"{said}; {alone.detail}"})


def _forms(taken: Sequence[Taken]) -> str:
    """Describe the other forms in which the template accepted chats, and how many it refused as they are."""
    forms = Counter((one.refused, one.form) for one in taken if one.form and one.rendered.text is not None)
    return "".join(
        f"; the template refuses {count} of them as they are, and takes them with {form}"
        if refused
        else f"; {count} of them with {form}"
        for (refused, form), count in forms.items()
    )


def _check(name: str, noun: str, items: Sequence[T], difference: Callable[[T], str | None]) -> Check:
    """Compare item by item; the check is not run if an item is unavailable, and fails if the runtime fails."""
    if not items:
        return Check(name=name, status="not run", detail=f"there are no {noun} to compare")
    try:
        differences = [found for item in items if (found := difference(item)) is not None]
    except RequestError as error:
        return Check(name=name, status="not run", detail=str(error))
    except ExporterError as error:
        return Check(name=name, status="failed", detail=str(error))
    status: Status = "failed" if differences else "passed"
    detail = f"{len(items) - len(differences)} of {len(items)} {noun} equal"
    if differences:
        detail += f"; first difference: {differences[0]}"
    return Check(name=name, status=status, detail=detail, value=len(differences), limit=0, unit=noun)


def _difference(item: object, right: object, actual: object) -> str | None:
    """Show both values from shortly before their first difference; None if they are equal."""
    if right == actual:
        return None
    if not isinstance(right, str | list) or not isinstance(actual, str | list):
        return f"{item!r:.80}: got {actual!r:.80}, expected {right!r:.80}"
    same = next(
        (i for i, (a, b) in enumerate(zip(right, actual, strict=False)) if a != b), min(len(right), len(actual))
    )
    start = max(0, same - 2)
    shown = slice(start, start + SHOWN)
    return f"{item!r:.80}: from position {start} got {actual[shown]!r}, expected {right[shown]!r}"
