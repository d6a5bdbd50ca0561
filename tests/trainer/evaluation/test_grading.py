"""Mathematics graded in processes: what ends one is not graded, and never wrong.

Run: python -m pytest tests/trainer/evaluation/test_grading.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer.errors import DatasetError, GraderError
from student_trainer.evaluation import grading
from student_trainer.evaluation.answers import AnswerFinder
from student_trainer.evaluation.grading import MathGrader, MathProcesses
from tests.trainer.in_memory import prompt
from tests.waiting import LIMIT_S, wait_until

ROOT = Path(__file__).resolve().parents[3]
ENDLESS = r"\boxed{2^{10000000000000}}"
"""One multiplication, inside which no signal handler of Python's would run."""


@pytest.fixture(scope="module")
def mathematics() -> Iterator[MathProcesses]:
    """One process for all tests; of a second of CPU time a question."""
    made = MathProcesses(processes=1, cpu_s=1.0)
    yield made
    made.close()


def grader(mathematics: MathProcesses, *, strict: bool = False) -> MathGrader:
    finder = AnswerFinder(None, unicode_normalize=False)
    return MathGrader(finder, mathematics, strict=strict)


def test_texts_and_numbers_need_no_process() -> None:
    mathematics = MathProcesses()
    pairs = [(r"\boxed{18.0}", "18"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("18", "18")]
    assert grader(mathematics).grade(pairs) == [True, True, False]
    at_once = [grader(mathematics).at_once(*pair) for pair in [*pairs, (r"\boxed{5}", "6")]]
    assert at_once == [True, True, False, False]
    assert grader(mathematics).at_once(r"\boxed{2/4}", "0.5") is None
    assert mathematics._workers == []


def test_mathematics_is_graded_off_the_main_thread(mathematics: MathProcesses) -> None:
    pairs = [(r"\boxed{\frac{2}{4}}", "0.5"), (r"\boxed{5}", "6"), (r"\boxed{50\%}", "50")]
    graded: list[list[bool | None]] = []
    thread = threading.Thread(target=lambda: graded.append(grader(mathematics).grade(pairs)))
    thread.start()
    thread.join(LIMIT_S)
    assert graded == [[True, False, False]]


def test_what_never_ends_is_not_graded_and_the_rest_is(mathematics: MathProcesses) -> None:
    pairs = [(r"\boxed{1/4}", "0.25"), (ENDLESS, "5"), (r"\boxed{1/4}", "0.5")]
    assert grader(mathematics).grade(pairs) == [True, None, False]


def test_a_process_that_was_killed_is_replaced(mathematics: MathProcesses) -> None:
    assert grader(mathematics).grade([(r"\boxed{3/4}", "0.75")]) == [True]
    (worker,) = mathematics._workers
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert grader(mathematics).grade([(r"\boxed{5/4}", "1.25")]) == [True]


def test_an_interrupt_leaves_no_process_behind() -> None:
    mathematics = MathProcesses(processes=1)

    def interrupted(*_: object) -> list[object]:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grading, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mathematics.ask([("equal", "1", "2")])
    assert mathematics._workers == []


def test_a_process_that_does_not_start_is_an_error_with_a_remedy() -> None:
    mathematics = MathProcesses(processes=1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "executable", "/bin/false")
        with pytest.raises(GraderError, match=r'does not start.*eval\.grader = "exact"'):
            mathematics.ask([("equal", "1", "2")])
    assert mathematics._workers == []


def test_processes_end_with_the_one_that_started_them() -> None:
    """Killed, so that it can close nothing."""
    code = """
from student_trainer.evaluation.grading import MathProcesses
made = MathProcesses(processes=1)
made.ask([("equal", "1/2", "0.5")])
print(made._workers[0].process.pid, flush=True)
input()
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "proto")])
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert Path(f"/proc/{worker}").exists()
        process.kill()
    wait_until(lambda: not Path(f"/proc/{worker}").exists())


def test_answers_that_math_verify_cannot_read_are_named(mathematics: MathProcesses) -> None:
    problems = [prompt(5, answer=r"\frac{1}{2}"), prompt(6, 7, answer=r"A \cup B")]
    with pytest.raises(DatasetError, match=r'^6-7: .*A \\\\cup B.*eval\.grader = "exact"'):
        grader(mathematics, strict=True).check(problems)
    grader(mathematics).check(problems)
