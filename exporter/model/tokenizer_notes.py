"""Notes on a tokenizer for the report."""

import re
from collections.abc import Iterable, Sequence

DEFAULT = "default"
# Names of templates other than the default become names of files and keys.
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAMED, EXAMPLES = 8, 3


def without_row(texts: Sequence[str]) -> tuple[str, ...]:
    """Note the added tokens omitted for lack of a row in the embedding."""
    if not texts:
        return ()
    return (f"added tokens of the tokenizer that the embedding has no rows for are left out: {_listed(texts)}",)


def not_held(texts: Iterable[str], source: str) -> tuple[str, ...]:
    """Note the special tokens that a tokenizer's settings name but its definition lacks."""
    named = list(dict.fromkeys(texts))
    if not named:
        return ()
    return (
        f"special tokens that the tokenizer's settings name but {source} does not hold are left out: {_listed(named)}",
    )


def on_templates(names: Iterable[str]) -> tuple[str, ...]:
    """Note the chat templates that are omitted, and whether there is no default among them."""
    given = list(names)
    odd = [name for name in given if not TEMPLATE_NAME.fullmatch(name)]
    return (
        *([f"chat templates whose names cannot be names of files are left out: {_listed(odd)}"] if odd else []),
        *(
            [f"none of the chat templates is the default, so none is used: {_listed(given)}"]
            if _no_default(given)
            else []
        ),
    )


def _no_default(names: Sequence[str]) -> bool:
    return bool(names) and DEFAULT not in names


def different(source: str, made: str, texts: Sequence[str], differing: Sequence[str]) -> tuple[str, ...]:
    """Note the texts on which transformers' tokenizer differs from the files' definition.

    Args:
        source: The file that defines the tokenizer.
        made: Name of transformers' class.
        texts: All texts compared.
        differing: Texts with different ids.
    """
    if not differing:
        return ()
    return (
        f"{source} itself is what counts: the {made} that transformers makes of it gives other ids to {len(differing)} "
        f"of {len(texts)} texts, such as {_listed(differing[:EXAMPLES])}",
    )


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(repr(text)[:40] for text in texts[:NAMED])
    return shown + (f" and {len(texts) - NAMED} more" if len(texts) > NAMED else "")
