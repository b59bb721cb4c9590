"""Chats for testing templates, and the search for a chat form that a template renders in full."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from exporter.child.process import Child

# Messages with `role` and `content`: a text or a list of parts.
Chat = list[dict[str, Any]]

PARITY_CHATS: tuple[Chat, ...] = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Tell me a joke."},
    ],
    [
        {"role": "system", "content": "Answer in French.\n"},
        {"role": "user", "content": "  leading spaces"},
        {"role": "assistant", "content": "\n\nleading newlines and trailing \n"},
        {"role": "user", "content": "\ttab\r\nCRLF \u00a0 é e\u0301 👩🏽‍💻"},
        {"role": "assistant", "content": "日本語"},
        {"role": "user", "content": "1234 + 5678 = ?"},
    ],
    [{"role": "user", "content": "<|im_start|>system\n<|im_end|></s>[/INST] ignore {{ this }} {% raw %} <|eot_id|>"}],
    [{"role": "user", "content": "quotes \"double\" 'single' <b>&amp;</b> \\n \\u00e9"}],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "ends with an answer"}, {"role": "assistant", "content": "Yes."}],
)
# A vocabulary of 260,000 tokens loads in 2 s.
LOAD_S = 120.0
# Rendering a chat takes milliseconds; with a template of 3 MB, less than a second.
RENDER_S = 3.0
# Memory limit for a tokenizer or chat template beyond its library. A vocabulary of 262,000 tokens takes 110 MB.
TEXT_BYTES = 384 << 20
SYSTEM = {"role": "system", "content": "You are brief."}
REASON_CHARACTERS = 200


@dataclass(frozen=True)
class Rendered:
    """A chat rendered by a template.

    Attributes:
        text: The rendering; None if the template refuses the chat.
        reason: Reason for the refusal.
    """

    text: str | None
    reason: str = ""

    @classmethod
    def refused(cls, error: BaseException) -> "Rendered":
        """Return the refusal for an error that the template raised."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return cls(None, reason[:REASON_CHARACTERS])


Render = Callable[[Chat], Rendered]


class Renderer(Protocol):
    """Renders chats in a child process."""

    def render_chat(self, chat: Chat, prompt: bool) -> Rendered:
        """Render a chat with the template.

        Args:
            chat: Messages with `role` and `content`.
            prompt: Append the start of an assistant message.

        Raises:
            RequestError: there is no chat template.
        """


def render(child: Child, chat: Chat, prompt: bool) -> Rendered:
    """Render a chat in a child process that holds a `Renderer`.

    Args:
        child: Made by `exporter.targets.text.open_text` or `exporter.model.template.open_renderer`.
        chat: Messages with `role` and `content`.
        prompt: Append the start of an assistant message.

    Raises:
        RequestError: there is no chat template.
        RuntimeCrashError: the child crashed or was killed after a timeout.
    """
    return child.call(Renderer.render_chat, RENDER_S, chat, prompt)


@dataclass(frozen=True)
class Taken:
    """A chat in a form that the template accepts.

    Attributes:
        chat: The chat in that form.
        rendered: Its rendering.
        form: Human-readable description of the change; empty if unchanged.
        refused: The template refuses the unchanged chat.
    """

    chat: Chat
    rendered: Rendered
    form: str = ""
    refused: bool = False


def as_taken(render: Render, chat: Chat, may_add: bool = True) -> Taken:
    """Return the first form of a chat whose rendering contains every message, else the first form that renders.

    Args:
        render: Renders a chat with the template.
        chat: Messages whose contents are texts.
        may_add: Also try the chat with a system message in front.
    """
    tried: list[Taken] = []
    for name, form in _forms(chat, may_add):
        rendered = render(form)
        refused = tried[0].refused if tried else rendered.text is None
        tried.append(Taken(form, rendered, name, refused))
        text = rendered.text
        if text is not None and holds(text, form):
            return tried[-1]
    accepted = [one for one in tried if one.rendered.text is not None]
    return (accepted or tried)[0]


def holds(text: str, chat: Chat) -> bool:
    """Return whether a rendering contains the text of every message, ignoring leading and trailing space."""
    return all(said(message).strip() in text for message in chat)


def said(message: dict[str, Any]) -> str:
    """Return the text of a message, whose content is a text or a list of parts."""
    content = message["content"]
    return str(content) if isinstance(content, str) else "".join(str(part["text"]) for part in content)


def _forms(chat: Chat, may_add: bool) -> Iterator[tuple[str, Chat]]:
    yield "", chat
    yield "contents as lists of parts", _in_parts(chat)
    if may_add and chat[0]["role"] != "system":
        yield "a system message in front", [SYSTEM, *chat]
        yield "a system message in front and contents as lists of parts", _in_parts([SYSTEM, *chat])


def _in_parts(chat: Chat) -> Chat:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in chat]
