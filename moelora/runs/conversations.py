"""Chats in the two forms that data sets have: messages with role and content, or ShareGPT's with from and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moelora.errors import RunError

# What ShareGPT's data sets call who speaks, and chat templates' names for them.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}


def as_messages(conversation: Any, where: str) -> list[dict[str, Any]]:
    """A chat as messages of role and content; those that have these keys already are returned as they are.

    Args:
        conversation: A list of messages of either form.
        where: What the chat is, for the message of an error.

    Raises:
        RunError: If it is no list of such messages, or ShareGPT's `from` names somebody unknown.
    """
    if not isinstance(conversation, list) or not conversation:
        raise RunError(f"{where} is {conversation!r}; needed: a list of messages, {_FORMS}.")
    return [_message(message, f"message {place} of {where}") for place, message in enumerate(conversation, 1)]


_FORMS = "each with role and content, or with ShareGPT's from and value"


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RunError(f"{where} is {message!r}; needed: a mapping, {_FORMS}.")
    # where messages of one file differ in their keys, `datasets` gives every message all of them, with None
    if message.get("role") is not None:
        return dict(message)
    speaker, text = message.get("from"), message.get("value")
    if speaker is None or text is None:
        raise RunError(f"{where} has the keys {', '.join(message)}; needed: {_FORMS}.")
    if speaker not in ROLES:
        raise RunError(
            f"{where} is from {speaker!r}, which is no known role; allowed: {', '.join(ROLES)}. Rename it in the rows, "
            "or leave such rows out."
        )
    return {"role": ROLES[speaker], "content": text}
