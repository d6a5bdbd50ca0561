"""What a conversation must be before a chat template sees it.

Templates say little of what they are given: they write an empty turn of nobody for a message that
calls its keys otherwise, and leave out content that is not text.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from student_trainer.errors import DatasetError

Message: TypeAlias = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")


def checked_messages(where: str, messages: Any) -> list[Message]:
    """The messages, each with `role` and its content as one text; absent keys are left out.

    Raises DatasetError naming the message and what it lacks.
    """
    if not isinstance(messages, list) or not messages:
        raise DatasetError(f"{where} must be a list of messages, is {shown(messages)}")
    return [_message(f"{where}[{number}]", message) for number, message in enumerate(messages)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DatasetError(f"{where} must be an object with role and content, is {shown(message)}")
    # Tables give every message the keys of all of them.
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given:
        raise DatasetError(f"{where} needs role and content, has {_keys(given)}")
    role = given["role"]
    if role not in ROLES:
        raise DatasetError(f"{where}.role is {shown(role)}, must be one of {', '.join(ROLES)}")
    calls = role == "assistant" and bool(given.get("tool_calls"))
    if "content" not in given and not calls:
        raise DatasetError(f"{where} needs role and content, has {_keys(given)}")
    content = _text(f"{where}.content", given.get("content", ""))
    if not content.strip() and not calls and role != "tool":
        raise DatasetError(f"{where}.content is empty")
    return {**given, "content": content}


def _text(where: str, content: Any) -> str:
    """Content as one text; parts of text are joined, parts that are none are refused."""
    if isinstance(content, list):
        parts = []
        for number, part in enumerate(content):
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise DatasetError(f"{where}[{number}] must be a part of text, is {shown(part)}")
            parts.append(checked_text(f"{where}[{number}]", text))
        return "".join(parts)
    return checked_text(where, content)


def checked_text(where: str, text: Any) -> str:
    """Text that has an encoding. Raises DatasetError."""
    if not isinstance(text, str):
        raise DatasetError(f"{where} must be text, is {shown(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise DatasetError(f"{where} holds {half}, half of a character") from None
    return text


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _keys(message: Message) -> str:
    return ", ".join(sorted(map(str, message))) or "none"
