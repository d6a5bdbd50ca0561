"""Which token ids student and teacher share, and what is to be said of the others.

An id takes part where both models have a logit for it and it means the same to both: the same
token, or none. The others take no part on either side: neither distribution has them, and the
student never says them. Widths alone say nothing of meaning, and are padded as each model likes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from student_trainer.errors import DatasetError, some
from student_trainer.records import Prompt
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.id_ranges import MAX_RANGES, IdRanges, inside, ranges_of, united
from teacher_wire.records import TeacherInfo
from teacher_wire.vocabulary import Vocabulary, differing_ranges

MAX_DIFFERING_SHARE = 0.01
"""Of the ids that either side has a token for; with more it is another tokenizer."""
NUM_NAMED = 10
"""Entries that a message names."""


class TokenTeller(Protocol):
    """A teacher that says what ids mean to it."""

    @property
    def info(self) -> TeacherInfo: ...

    async def tokens(self, first_id: int, count: int) -> dict[int, str]:
        """Ids of a range that have a token, with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An id that means one thing to the student and another to the teacher."""

    token_id: int
    student: str | None
    teacher: str | None

    def __str__(self) -> str:
        return f"{self.token_id} ({_named(self.student)} / {_named(self.teacher)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedIds:
    """What came of comparing a student with one teacher."""

    student_width: int
    """Logits of the student's model."""
    teacher_width: int
    differing: tuple[Entry, ...] = ()
    """Ascending."""

    @property
    def excluded_ids(self) -> IdRanges:
        """Ids that take no part, up to the larger width."""
        low, high = sorted((self.student_width, self.teacher_width))
        tail = ((low, high),) if low < high else ()
        return united(ranges_of(e.token_id for e in self.differing if e.token_id < low), tail)

    def warnings(self, end_ids: Iterable[int]) -> list[str]:
        """What is to be said before the first step; `end_ids` end the responses of a side."""
        found = []
        low, high = sorted((self.student_width, self.teacher_width))
        if low < high:
            found.append(
                f"the student has {self.student_width} logits, the teacher {self.teacher_width}: "
                f"the ids from {low} to {high - 1} take no part"
            )
        if self.differing:
            found.append(
                f"ids that mean something else to the teacher than to the student take no part "
                f"({len(self.differing)}; student / teacher): {_first(self.differing)}"
            )
        ends = np.array(sorted(set(end_ids)), np.int64)
        if unsaid := ends[inside(self.excluded_ids, ends)].tolist():
            found.append(
                f"end tokens among the ids that take no part, which the student can never say: "
                f"{', '.join(map(str, unsaid))}; name another in rollout.stop_tokens"
            )
        return found

    def refuse_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raises DatasetError for a prompt with an id that the teacher reads as something else, or
        that a model has no row for, naming prompt and entry."""
        self._refuse(
            (f"{prompt.prompt_id}: the prompt", prompt.token_ids, prompt.teacher_prompt_ids)
            for prompt in prompts
        )

    def refuse_turns(self, prompts: Iterable[Prompt]) -> None:
        """The same for their turns, which are given to both; names the turn too."""
        self._refuse(
            (f"{prompt.prompt_id}: turns[{number}]", turn_ids, turn_ids)
            for prompt in prompts
            for number, turn_ids in enumerate(prompt.turns)
        )

    def _refuse(self, given: Iterable[tuple[str, NDArray[np.int32], NDArray[np.int32]]]) -> None:
        """`given`: where it is written, the ids for the student, those for the teacher."""
        entries = {entry.token_id: entry for entry in self.differing}
        differing = ranges_of(entries)
        for where, student_ids, teacher_ids in given:
            if entries and (found := inside(differing, teacher_ids)).any():
                entry = entries[int(teacher_ids[found][0])]
                raise DatasetError(
                    f"{where} has the id {entry.token_id}, which is {_named(entry.student)} to the "
                    f"student and {_named(entry.teacher)} to the teacher: write it without that "
                    "token, or give both one tokenizer"
                )
            for side, ids, width in (
                ("student", student_ids, self.student_width),
                ("teacher", teacher_ids, self.teacher_width),
            ):
                if (largest := int(ids.max(initial=0))) >= width:
                    raise DatasetError(
                        f"{where} has the id {largest}, and the {side}'s model has {width} ids: "
                        "write it without that token"
                    )


async def shared_ids(
    own: Vocabulary, student_width: int, teacher: TokenTeller, *, student: str = "the student"
) -> SharedIds:
    """Compares the tokens of a student with a teacher's, asking for no more than differs.

    Without tokens of its own a student is compared by width alone. Raises FingerprintMismatchError
    for another tokenizer, naming both models (`student` is what to call that one), entries and
    counts.
    """
    info = teacher.info
    names = f"{student} and the teacher {info.model_id}"
    differing: tuple[Entry, ...] = ()
    if own.tokens and own.fingerprint != info.tokenizer_fingerprint:
        if not info.token_digests:
            raise FingerprintMismatchError(
                f"{names} cannot be compared: the teacher does not tell its tokens, as it has no "
                "tokenizer or is of an earlier version. Start it with --tokenizer, or a newer one"
            )
        parts = differing_ranges(own.digests, info.token_digests)
        answers = await asyncio.gather(*(teacher.tokens(*part) for part in parts))
        theirs = {token_id: token for answer in answers for token_id, token in answer.items()}
        ours = {i: token for part in parts for i, token in own.named(*part).items()}
        differing = tuple(
            Entry(token_id=i, student=ours.get(i), teacher=theirs.get(i))
            for i in sorted(ours.keys() | theirs.keys())
            if ours.get(i) != theirs.get(i)
        )
        num_theirs = own.num_named - len(ours) + len(theirs)
        num_either = own.num_named + len(theirs.keys() - ours.keys())
        _refuse_another(names, differing, own.num_named, num_theirs, num_either)
    return SharedIds(
        student_width=student_width, teacher_width=info.vocab_size, differing=differing
    )


def _refuse_another(
    names: str, differing: Sequence[Entry], num_own: int, num_theirs: int, num_either: int
) -> None:
    is_other = len(differing) > MAX_DIFFERING_SHARE * num_either
    if not is_other and len(ranges_of(e.token_id for e in differing)) < MAX_RANGES:
        return
    limit = f"more than {MAX_DIFFERING_SHARE:.0%}" if is_other else f"in {MAX_RANGES} places"
    raise FingerprintMismatchError(
        f"{names} have different tokenizers: of {num_either} ids {len(differing)} mean "
        f"something else, {limit}, such as {_first(differing)} (student / teacher); the student "
        f"has {num_own} tokens, the teacher {num_theirs}. Take a teacher with the student's "
        "tokenizer, or a student with the teacher's"
    )


def _first(entries: Sequence[Entry]) -> str:
    return some([str(entry) for entry in entries], NUM_NAMED)


def _named(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
