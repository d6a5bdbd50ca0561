"""Which answers are right: by text and number here, by mathematics in processes of their own.

A grade is True, False, or None for an answer that could not be graded: a comparison that ran out of
CPU time, or of memory, or broke down. It is never taken for a wrong one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Protocol

from student_trainer.errors import DatasetError, GraderError
from student_trainer.evaluation import answers, math_worker
from student_trainer.evaluation.answers import AnswerFinder
from student_trainer.records import Prompt

MAX_PROCESSES = 2
CPU_S = 10.0
"""CPU time of one comparison. Ordinary ones take milliseconds, the first of a kind one second."""
WALL_S = 600.0
"""For a process that waits for something instead of computing; no load comes near it."""
PACKAGES = Path(__file__).resolve().parents[2]


class Grader(Protocol):
    """What makes an answer right."""

    def grade(self, responses: Sequence[tuple[str, str]]) -> list[bool | None]:
        """A grade for each response and expected answer."""

    def at_once(self, response: str, answer: str) -> bool | None:
        """A grade in any thread and without another process; None where mathematics would have to
        be compared."""

    def check(self, problems: Sequence[Prompt]) -> None:
        """Raises DatasetError for an expected answer that no response can be graded against."""


class ExactGrader:
    """The answer must be the same text, or the same number however it is written."""

    def __init__(self, finder: AnswerFinder) -> None:
        self._finder = finder

    def grade(self, responses: Sequence[tuple[str, str]]) -> list[bool | None]:
        return [exactly(found, expected) for found, expected in self.found(responses)]

    def at_once(self, response: str, answer: str) -> bool:
        return self.grade([(response, answer)])[0] is True

    def found(self, responses: Sequence[tuple[str, str]]) -> list[tuple[str | None, str]]:
        """The answer in each response, and the expected one as it is compared."""
        return [
            (self._finder.find(response), self._finder.written(answer).strip())
            for response, answer in responses
        ]

    def check(self, problems: Sequence[Prompt]) -> None:
        for problem in problems:
            why = None if problem.answer is None else self._finder.never_found(problem.answer)
            if why is not None:
                raise DatasetError(
                    f"{problem.prompt_id}: the answer {problem.answer!r} {why}, so no response "
                    "would ever be right: mend the row, or set eval.answer_pattern"
                )


def exactly(found: str | None, expected: str) -> bool:
    """Whether there is an answer, and it is the expected text or number."""
    return found is not None and answers.same(found, expected)


class MathGrader:
    """The answer must be the same mathematics. What is the same text or number costs nothing."""

    def __init__(self, finder: AnswerFinder, mathematics: MathProcesses, *, strict: bool) -> None:
        """`strict` refuses an expected answer that is not mathematics; else it must be given as
        the same text."""
        self._exact = ExactGrader(finder)
        self._mathematics = mathematics
        self._strict = strict

    def grade(self, responses: Sequence[tuple[str, str]]) -> list[bool | None]:
        answered = self._exact.found(responses)
        grades: list[bool | None] = [exactly(found, expected) for found, expected in answered]
        unlike = {
            index: ("equal", found, expected)
            for index, (found, expected) in enumerate(answered)
            if found and not grades[index]
        }
        distinct = list(dict.fromkeys(unlike.values()))
        verdicts = dict(zip(distinct, self._mathematics.ask(distinct), strict=True))
        for index, question in unlike.items():
            grades[index] = verdicts[question]
        return grades

    def at_once(self, response: str, answer: str) -> bool | None:
        ((found, expected),) = self._exact.found([(response, answer)])
        if exactly(found, expected):
            return True
        numbers = [answers.plain_number(text) for text in (found or "", expected)]
        return None if found and None in numbers else False

    def check(self, problems: Sequence[Prompt]) -> None:
        self._exact.check(problems)
        if not self._strict:
            return
        unclear = [
            problem
            for problem in problems
            if problem.answer is not None and answers.plain_number(problem.answer) is None
        ]
        questions = [("readable", problem.answer or "") for problem in unclear]
        for problem, readable in zip(unclear, self._mathematics.ask(questions), strict=True):
            if not readable:
                raise DatasetError(
                    f"{problem.prompt_id}: math-verify cannot read the answer {problem.answer!r}: "
                    'mend the row, or compare texts with eval.grader = "exact"'
                )


@dataclass(slots=True, eq=False)
class _Worker:
    connection: Connection
    process: subprocess.Popen[bytes]
    ready: bool = False
    index: int | None = None
    """Of the question it works on; None while it is idle."""
    deadline_s: float = 0.0

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


@dataclass(slots=True, kw_only=True)
class MathProcesses:
    """A few processes that compare mathematics: started when needed, ended by `close` or with us.

    Not a pool of the standard library, which one question that never ends would break.
    """

    processes: int = MAX_PROCESSES
    cpu_s: float = CPU_S
    wall_s: float = WALL_S
    _workers: list[_Worker] = field(default_factory=list)

    def ask(self, questions: Sequence[tuple[str, ...]]) -> list[bool | None]:
        """The verdict on each question, None where there is none. In any thread, one at a time.

        Raises GraderError when the processes do not start.
        """
        verdicts: list[bool | None] = [None] * len(questions)
        left = deque(range(len(questions)))
        try:
            while True:
                self._hand_out(left, questions)
                busy = [worker for worker in self._workers if worker.index is not None]
                if not busy:
                    return verdicts
                self._take(busy, verdicts)
        except BaseException:
            # What is half answered belongs to nobody after an interrupt.
            self.close()
            raise

    def close(self) -> None:
        """Ends every process."""
        while self._workers:
            self._workers.pop().end()

    def _hand_out(self, left: deque[int], questions: Sequence[tuple[str, ...]]) -> None:
        """A question to every process that has none; as many processes as there is work for."""
        idle = [worker for worker in self._workers if worker.index is None]
        while left and (idle or len(self._workers) < self.processes):
            if not idle:
                idle.append(self._started())
            worker = idle.pop()
            try:
                worker.connection.send(questions[left[0]])
            except OSError:  # it was ended while it was idle
                self._drop(worker)
            else:
                worker.index = left.popleft()
                worker.deadline_s = time.monotonic() + self.wall_s

    def _take(self, busy: Sequence[_Worker], verdicts: list[bool | None]) -> None:
        """Waits for the next answers, and for the end of processes that have none."""
        patience_s = min(worker.deadline_s for worker in busy) - time.monotonic()
        answered = wait([worker.connection for worker in busy], max(0.0, patience_s))
        for worker in busy:
            if worker.connection in answered:
                self._hear(worker, verdicts)
            elif time.monotonic() >= worker.deadline_s:
                self._drop(worker)

    def _hear(self, worker: _Worker, verdicts: list[bool | None]) -> None:
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            self._drop(worker)
            if not worker.ready:
                raise GraderError(
                    "math-verify does not start in a process of its own: install the "
                    'requirements of driftline again, or set eval.grader = "exact"'
                ) from None
            return
        if said == math_worker.READY:
            worker.ready = True
        elif worker.index is not None:
            verdicts[worker.index], worker.index = said, None

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def _started(self) -> _Worker:
        ours, theirs = Pipe()
        path = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", math_worker.__name__]
        with theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(self.cpu_s)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        worker = _Worker(ours, process)
        self._workers.append(worker)
        return worker
