"""What a row of a data set may hold, and nothing of what becomes of it. docs/data.md has it in a
table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from student_trainer.data.files import WrittenNumber
from student_trainer.data.messages import Message, checked_messages, checked_text, shown
from student_trainer.errors import DatasetError

Problem: TypeAlias = str | list[Message] | list[int]
"""Text, a conversation, or token ids."""
PROBLEM_FIELDS = ("prompt", "messages", "prompt_ids")
TURN_ROLES = ("user", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFields:
    """Fields that a data set may call otherwise; a dot leads into an object."""

    prompt: str | None = None
    """None: the one of `prompt`, `messages` and `prompt_ids` that is there."""
    answer: str = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One problem as it was written down."""

    where: str
    """File and line, for messages."""
    row_id: str
    problem: Problem
    answer: str | None
    teacher_problem: str | list[Message] | None
    """What the teacher is given instead."""
    teacher: str | None
    """Which of several teachers."""
    template_kwargs: dict[str, Any]
    """Switches of the chat template."""
    tools: list[dict[str, Any]] | None
    """Descriptions of functions, for the chat template."""
    turns: list[Message]
    """What is said to the student after each of its answers but the last."""


def checked_row(where: str, row: Mapping[str, Any], fields: RowFields) -> Row:
    """The row. A field that is null is absent; others are ignored.

    Raises DatasetError naming row, field, and what it must be.
    """
    return Row(
        where=where,
        row_id=_id(where, row.get("id")),
        problem=_problem(where, row, fields.prompt),
        answer=_answer(f"{where}: {fields.answer}", _found(row, fields.answer)),
        teacher_problem=_teacher_problem(where, row.get("teacher_prompt")),
        teacher=_teacher(where, row.get("teacher")),
        template_kwargs=_template_kwargs(where, row.get("chat_template_kwargs")),
        tools=_tools(where, row.get("tools")),
        turns=_turns(f"{where}: turns", row.get("turns")),
    )


def _problem(where: str, row: Mapping[str, Any], named: str | None) -> Problem:
    if named is None:
        there = [name for name in PROBLEM_FIELDS if row.get(name) is not None]
        if len(there) > 1:
            raise DatasetError(
                f"{where}: has {' and '.join(there)}: data.prompt_field says which is the problem"
            )
    else:
        there = [named] if _found(row, named) is not None else []
    if not there:
        needed = "`prompt` (text or messages), `messages` or `prompt_ids`"
        raise DatasetError(f"{where}: needs {f'`{named}`' if named else needed}, has {sorted(row)}")
    name = there[0]
    at, value = f"{where}: {name}", _found(row, name)
    if isinstance(value, list) and (name == "prompt_ids" or _are_numbers(value)):
        return _ids(at, value)
    if isinstance(value, str) and name not in ("messages", "prompt_ids"):
        return checked_text(at, value)
    if name != "messages" and not isinstance(value, list):
        raise DatasetError(f"{at} must be text or a list of messages, is {shown(value)}")
    return checked_messages(at, value)


def _are_numbers(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, int) for item in value)


def _ids(where: str, ids: list[Any]) -> list[int]:
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise DatasetError(f"{where} must be a list of token ids, is {shown(ids)}")
    return ids


def _teacher_problem(where: str, value: Any) -> str | list[Message] | None:
    at = f"{where}: teacher_prompt"
    if value is None:
        return None
    return checked_text(at, value) if isinstance(value, str) else checked_messages(at, value)


def _teacher(where: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise DatasetError(f"{where}: teacher must be the name of one, is {shown(value)}")
    return value


def _id(where: str, value: Any) -> str:
    if value is None:
        return where
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DatasetError(f"{where}: id must be text or a whole number, is {shown(value)}")
    return str(value)


def _answer(where: str, value: Any) -> str | None:
    """As it was written: 1.50 stays 1.50."""
    if value is None:
        return None
    if isinstance(value, str):
        return checked_text(where, value)
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DatasetError(f"{where} must be text or a number, is {shown(value)}")
    if not math.isfinite(value):
        raise DatasetError(f"{where} is {value}; what is missing is null")
    return str(value)


def _template_kwargs(where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: chat_template_kwargs must be an object, is {shown(value)}")
    # Tables give every row the keys of all of them.
    return {key: item for key, item in value.items() if item is not None}


def _tools(where: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DatasetError(f"{where}: tools must be a list of objects, is {shown(value)}")
    return value


def _turns(where: str, value: Any) -> list[Message]:
    if value is None or value == []:
        return []
    turns = checked_messages(where, value)
    for number, turn in enumerate(turns):
        if turn["role"] not in TURN_ROLES:
            raise DatasetError(
                f"{where}[{number}].role is {turn['role']!r}, must be {' or '.join(TURN_ROLES)}: "
                "the student answers each turn itself"
            )
    return turns


def _found(row: Mapping[str, Any], name: str) -> Any:
    """The field of that name, or, along its dots, one within objects; None where there is none."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    within = row.get(outer)
    return _found(within, inner) if isinstance(within, Mapping) else None
