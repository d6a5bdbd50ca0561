"""Conversations to text, by a chat template; and where a template is read from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.data.messages import Message
from student_trainer.errors import DatasetError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED_ROLES = ("system", "developer", "user")
"""What they say stands in the text as it is, or they were left out; other roles are rewritten."""


def template_of(path: Path) -> str:
    """The text of a chat template: of a Jinja file, or of the checkpoint in a folder.

    Raises DatasetError naming what is missing.
    """
    try:
        if not path.is_dir():
            return path.read_text(encoding="utf-8")
        if (own := path / "chat_template.jinja").is_file():
            return own.read_text(encoding="utf-8")
        config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        template = config.get("chat_template")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: no chat template can be read there: {error}") from None
    if not isinstance(template, str):
        raise DatasetError(f"{path}: its tokenizer_config.json has no chat_template of one text")
    return template


def rendered(
    where: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    switches: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
) -> str:
    """The text of a conversation, up to where the assistant begins.

    None for the tokenizer's own template. Raises DatasetError when the template refuses, does not
    know a switch, or leaves out what somebody said.
    """
    try:
        template = tokenizer.get_chat_template(template, tools)
        for name in switches:
            if re.search(rf"\b{re.escape(name)}\b", template) is None:
                raise DatasetError(
                    f"{where}: chat_template_kwargs has {name!r}, which the chat template does not "
                    "look at"
                )
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **switches,
        )
    except DatasetError:
        raise
    # A template is a program: it may raise anything.
    except Exception as error:
        reason = one_line(error)
        raise DatasetError(f"{where}: the chat template refuses: {reason}") from error
    for number, message in enumerate(messages):
        if message["role"] in CHECKED_ROLES and message["content"].strip() not in text:
            raise DatasetError(
                f"{where}: the chat template leaves out the content of message {number}, of role "
                f"{message['role']}"
            )
    return str(text)
