"""Rows to prompts: templates, beginnings, lengths. The one place where text of data becomes ids."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from student_trainer.data.messages import Message
from student_trainer.data.rows import Problem, Row, RowFields, checked_row
from student_trainer.data.sources import Source
from student_trainer.data.templates import rendered
from student_trainer.data.turns import turn_text
from student_trainer.errors import DatasetError
from student_trainer.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
PROBE = "a"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How a row becomes ids, where the row does not say."""

    fields: RowFields = field(default_factory=RowFields)
    system: str | None = None
    """Put before conversations that have no system message."""
    chat_template: str | None = None
    """None: the tokenizer's."""
    teacher_chat_template: str | None = None
    """For the teacher's side of every conversation; None: as the student's."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_bos: bool | None = None
    """Before a prompt of text; None: as the tokenizer itself does."""
    final_assistant: Literal["refuse", "reference"] = "refuse"
    """What a last turn of the assistant is: an error, or the answer where there is no other."""
    teachers: Collection[str] = ()
    """Names that a row's `teacher` may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What of a data set may be wanting before all of it is refused."""

    too_long: Literal["refuse", "skip"] = "refuse"
    max_skipped_share: float = 0.1
    max_lossy_share: float = 0.1
    """Of the prompts of text: those whose ids decode to another text."""


def load_prompts(
    source: Source | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_response_tokens: int | None = None,
    form: PromptFormat | None = None,
    limits: Limits | None = None,
) -> list[Prompt]:
    """Every problem of a data set that is short enough: its prompt, and its turns with a token for
    each answer in a response of `max_response_tokens` (None: of any length).

    Raises DatasetError naming the file, the row, and the limit; logs a warning that counts what was
    skipped or does not come back from its ids.
    """
    source = source if isinstance(source, Source) else Source(path=source)
    form, limits = form or PromptFormat(), limits or Limits()
    encoder = Encoder(tokenizer, form)
    prompts: list[Prompt] = []
    too_long: list[str] = []
    for where, fields in source.rows():
        row = checked_row(where, fields, form.fields)
        prompt = encoder.prompt(row)
        reason = _misfit(prompt, max_prompt_tokens, max_response_tokens)
        if reason is None:
            prompts.append(prompt)
            continue
        is_empty = not (len(prompt.token_ids) or len(prompt.teacher_prompt_ids))
        if limits.too_long == "refuse" or is_empty:
            remedy = "" if is_empty else '; data.too_long = "skip" goes on without such rows'
            raise DatasetError(f"{where}: {reason}{remedy}")
        too_long.append(f"{where}: {reason}")
    _within(
        too_long,
        len(prompts) + len(too_long),
        limits.max_skipped_share,
        f"{source.path}: {{}} rows are too long and were left out",
        "data.max_skipped_share",
    )
    if not prompts:
        raise DatasetError(f"{source.path}: the dataset is empty")
    _within(
        encoder.lossy,
        encoder.num_texts,
        limits.max_lossy_share,
        f"{source.path}: {{}} prompts do not come back from their token ids, so the student does "
        "not read what stands there",
        "data.max_lossy_share",
    )
    return prompts


def _misfit(prompt: Prompt, max_prompt: int, max_response: int | None) -> str | None:
    """Why a problem cannot be given, or answered to its end; None where it can."""
    length = max(len(prompt.token_ids), len(prompt.teacher_prompt_ids))
    if not 1 <= length <= max_prompt:
        return f"the prompt has {length} tokens, must be 1 to {max_prompt}"
    num_said, num_answers = sum(map(len, prompt.turns)), len(prompt.turns) + 1
    if prompt.turns and max_response is not None and num_said + num_answers > max_response:
        return (
            f"turns of {num_said} tokens and one for each of {num_answers} answers do not fit in "
            f"{max_response}, the longest response (by budget, held out by eval.max_tokens)"
        )
    return None


def _within(found: list[str], of: int, max_share: float, what: str, setting: str) -> None:
    """Warns of what was found; raises DatasetError when it is more than the share."""
    if not found:
        return
    said = f"{what.format(f'{len(found)} of {of}')}; the first: {found[0]}"
    if len(found) > max_share * of:
        raise DatasetError(f"{said}. That is more than {setting}, {max_share}")
    log.warning("%s", said)


class Encoder:
    """Rows to prompts with one tokenizer, and a count of the texts that it does not keep."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, form: PromptFormat) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._beginning = beginning_ids(tokenizer, form.add_bos)
        self._num_ids = max(tokenizer.get_vocab().values()) + 1
        self.num_texts = 0
        self.lossy: list[str] = []
        """Where, and how the text begins that its ids decode to."""

    def prompt(self, row: Row) -> Prompt:
        """The prompt of a row, of whatever length. Raises DatasetError naming the row."""
        if row.teacher is not None and row.teacher not in self._form.teachers:
            there = ", ".join(sorted(self._form.teachers)) or "none"
            raise DatasetError(
                f"{row.where}: teacher {row.teacher!r} has no table [teachers.{row.teacher}]; "
                f"there are: {there}"
            )
        problem, reference = self._without_reference(row)
        problem = self._with_system(row, problem)
        text, ids = self._encoded(row, problem, self._form.chat_template)
        teacher_ids = self._teacher_ids(row, problem)
        return Prompt(
            prompt_id=row.row_id,
            text=text,
            token_ids=np.asarray(ids, np.int32),
            answer=reference if row.answer is None else row.answer,
            teacher=row.teacher,
            teacher_token_ids=None
            if teacher_ids is None or teacher_ids == ids
            else np.asarray(teacher_ids, np.int32),
            turns=tuple(self._turns(row)),
        )

    def _turns(self, row: Row) -> Iterator[NDArray[np.int32]]:
        if row.turns and not _is_chat(row.problem):
            raise DatasetError(f"{row.where}: turns go on with a conversation, the problem is none")
        for number, turn in enumerate(row.turns):
            text = turn_text(
                f"{row.where}: turns[{number}]",
                turn,
                self._tokenizer,
                template=self._form.chat_template,
                switches={**self._form.template_kwargs, **row.template_kwargs},
                tools=row.tools,
            )
            yield np.asarray(self._ids(row, text), np.int32)

    def _without_reference(self, row: Row) -> tuple[Problem, str | None]:
        problem = row.problem
        if not _is_chat(problem) or problem[-1]["role"] != "assistant":
            return problem, None
        if self._form.final_assistant == "refuse":
            raise DatasetError(
                f"{row.where}: the conversation ends with the assistant, so there is nothing to "
                'answer; data.final_assistant = "reference" takes that turn as the answer'
            )
        if len(problem) == 1:
            raise DatasetError(f"{row.where}: the conversation is the assistant's turn alone")
        return problem[:-1], problem[-1]["content"]

    def _with_system(self, row: Row, problem: Problem) -> Problem:
        if self._form.system is None:
            return problem
        if not _is_chat(problem):
            raise DatasetError(f"{row.where}: data.system goes before conversations, this is none")
        if problem[0]["role"] in ("system", "developer"):
            return problem
        return [{"role": "system", "content": self._form.system}, *problem]

    def _teacher_ids(self, row: Row, problem: Problem) -> list[int] | None:
        template = self._form.teacher_chat_template
        if row.teacher_problem is not None:
            if _is_chat(row.teacher_problem) and row.teacher_problem[-1]["role"] == "assistant":
                raise DatasetError(f"{row.where}: teacher_prompt ends with the assistant")
            return self._encoded(row, row.teacher_problem, template or self._form.chat_template)[1]
        if template is not None and _is_chat(problem):
            return self._encoded(row, problem, template)[1]
        return None

    def _encoded(self, row: Row, problem: Problem, template: str | None) -> tuple[str, list[int]]:
        """Text and ids. A template writes its own beginning; nothing is added to it."""
        if _is_ids(problem):
            wrong = next((i for i in problem if not 0 <= i < self._num_ids), None)
            if wrong is not None:
                raise DatasetError(
                    f"{row.where}: prompt_ids has {wrong}, the tokenizer has 0 to "
                    f"{self._num_ids - 1}"
                )
            return self._decoded(problem), problem
        if _is_chat(problem):
            text = rendered(
                row.where,
                problem,
                self._tokenizer,
                template=template,
                switches={**self._form.template_kwargs, **row.template_kwargs},
                tools=row.tools,
            )
            return text, self._ids(row, text)
        assert isinstance(problem, str)
        if row.template_kwargs or row.tools:
            raise DatasetError(
                f"{row.where}: chat_template_kwargs and tools are for a chat template, and the "
                "problem is plain text"
            )
        ids = self._ids(row, problem)
        begins = tuple(ids[: len(self._beginning)]) == self._beginning
        return problem, ids if begins else [*self._beginning, *ids]

    def _ids(self, row: Row, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        self.num_texts += 1
        back = self._decoded(ids)
        if _compared(back) != _compared(text):
            self.lossy.append(f"{row.where}: {text[:40]!r} comes back as {back[:40]!r}")
        return ids

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def beginning_ids(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> tuple[int, ...]:
    """What stands before every prompt of text: by habit of the tokenizer, always, or never.

    The habit is what the tokenizer puts before a text when it is asked for special tokens; what it
    puts behind one ends the text and is left out. Raises DatasetError where there is no BOS to add.
    """
    if add_bos is False:
        return ()
    if add_bos is None:
        plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        whole = tokenizer(PROBE)["input_ids"]
        starts = range(len(whole) - len(plain) + 1)
        start = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:start])
    if tokenizer.bos_token_id is None:
        raise DatasetError(
            "data.add_bos is true, but the tokenizer has no token of beginning (BOS)"
        )
    return (int(tokenizer.bos_token_id),)


def _is_chat(problem: Problem) -> TypeGuard[list[Message]]:
    return isinstance(problem, list) and bool(problem) and isinstance(problem[0], dict)


def _is_ids(problem: Problem) -> TypeGuard[list[int]]:
    return isinstance(problem, list) and not _is_chat(problem)


def _compared(text: str) -> str:
    """Text without what tokenizers change on purpose: compatibility forms, space at the ends."""
    return unicodedata.normalize("NFKC", text).strip()
