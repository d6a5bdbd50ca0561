"""What is said to the student between its answers, as ids that follow what it sampled.

No template is prefix-stable for sure (Qwen3's drops the reasoning of earlier answers), so an answer
is never rendered again: a turn is rendered after a stand-in for the answer, and cut off behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from student_trainer.data.messages import Message
from student_trainer.data.templates import rendered
from student_trainer.errors import DatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "standing in for a question", "standing in for an answer"


def turn_text(
    where: str,
    turn: Message,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    switches: Mapping[str, Any],
    tools: list[dict[str, Any]] | None,
) -> str:
    """From what ends the answer before it to where the next one begins.

    Raises DatasetError where the template refuses, or does not show where an answer ends.
    """
    before: list[Message] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    text = rendered(
        where, [*before, turn], tokenizer, template=template, switches=switches, tools=tools
    )
    _, *following = text.split(ANSWER)
    if len(following) != 1 or turn["content"].strip() not in following[0]:
        raise DatasetError(
            f"{where}: the chat template does not write a {turn['role']} message after an answer, "
            "so it cannot be put between two"
        )
    return following[0]
