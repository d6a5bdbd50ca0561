"""pass@k, responses, evaluation. Run: python -m pytest tests/trainer/evaluation/test_evaluate.py"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from student_trainer.diagnostics.step_report import EvalReport
from student_trainer.errors import DatasetError
from student_trainer.evaluation.answers import AnswerFinder
from student_trainer.evaluation.evaluate import check_problems, evaluation_report
from student_trainer.evaluation.grading import ExactGrader
from student_trainer.evaluation.passes import average, mean_pass_at_k, pass_at_k, share_right
from student_trainer.evaluation.responses import Plan, Scoring, respond
from student_trainer.records import Prompt, SamplingOptions
from teacher_wire.errors import EngineError, NotReadyError
from tests.trainer.in_memory import EOS_ID, InMemorySampler, ScriptedSession, rules, teacher_rows
from tests.trainer.learner.tiny_student import character_tokenizer

TOKENIZER = character_tokenizer()
GRADER = ExactGrader(AnswerFinder(r"#(\d+)", unicode_normalize=False))


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 1, 1, 0.25), (4, 1, 4, 1.0), (5, 2, 2, 0.7), (4, 0, 4, 0.0), (4, 4, 1, 1.0), (1, 1, 1, 1)],
)
def test_pass_at_k_golden_values(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(6, 2, 3), (5, 1, 4), (7, 3, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_of_impossible_counts_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples with {c} correct"):
        pass_at_k(n, c, k)


def test_what_was_not_graded_is_in_no_figure() -> None:
    grades = [[True, None, False, False], [None, None, None, None], [True, True, None, None]]
    assert average(grades) == pytest.approx((1 / 3 + 1) / 2)
    assert mean_pass_at_k(grades, 2) == pytest.approx((pass_at_k(3, 1, 2) + 1) / 2)
    assert mean_pass_at_k(grades, 3) == 1.0
    assert mean_pass_at_k(grades, 4) is None
    assert share_right([None]) is None


class Answering(InMemorySampler):
    """Answers the prompt's own digit when `right` says so for prompt and seed, else x."""

    def __init__(self, right: dict[tuple[str, float, int], bool]) -> None:
        super().__init__(tokens_per_delta=2)
        self.right = right
        self.drawn: list[tuple[str, float, int]] = []

    def draw(
        self, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        assert options.top_p == 1.0
        digit = TOKENIZER.decode(prompt_ids.tolist())
        self.drawn.append((digit, options.temperature, options.seed or 0))
        right = self.right.get(self.drawn[-1], False)
        text = f"a#{digit}" if right else "a#x"
        ids = np.array([*TOKENIZER(text)["input_ids"], EOS_ID], np.int32)[: options.max_tokens]
        topk = np.tile(np.arange(options.num_topk, dtype=np.int32), (len(ids), 1))
        return ids, topk, np.full(len(ids), -1.0, np.float32)


def problem(digit: str, answer: str | None = "") -> Prompt:
    """The digit is the answer, unless told."""
    ids = np.array(TOKENIZER(digit)["input_ids"], np.int32)
    answer = digit if answer == "" else answer
    return Prompt(prompt_id=f"q{digit}", text=digit, token_ids=ids, answer=answer)


RIGHT = {
    ("5", 0.0, 0): True, ("5", 0.7, 1): True, ("5", 0.7, 2): False,
    ("6", 0.0, 0): False, ("6", 0.7, 1): False, ("6", 0.7, 2): False,
}  # fmt: skip


def scoring(temperature: float, sessions: list[ScriptedSession]) -> Scoring:
    def opened(_: Prompt) -> ScriptedSession:
        sessions.append(ScriptedSession(truncate_at=None))
        return sessions[-1]

    return Scoring(
        open_session=opened, rules={None: rules()}, temperature=temperature, num_topk=2, overlap_k=2
    )


async def evaluated(
    sampler: InMemorySampler,
    problems: list[Prompt],
    *,
    max_tokens: int = 20,
    pass_k: tuple[int, ...] = (),
    scored_by: Scoring | None = None,
    num_scored: int = 1,
    num_texts: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvalReport:
    plan = Plan(
        options=SamplingOptions(max_tokens=max_tokens, top_p=0.5),
        num_samples=max(pass_k, default=0),
        temperature=0.7,
        num_scored=num_scored,
    )
    responses = await respond(sampler, problems, plan, scored_by, name="x", progress=progress)
    return evaluation_report(
        responses,
        GRADER,
        lambda ids: TOKENIZER.decode(ids.tolist(), skip_special_tokens=True),
        step=3,
        pass_k=pass_k,
        overlap_k=2,
        num_texts=num_texts,
    )


async def test_evaluation_counts_greedy_answers_and_samples_apart() -> None:
    seen: list[tuple[int, int]] = []
    sampler = Answering(RIGHT)
    report = await evaluated(
        sampler,
        [problem("5"), problem("6")],
        pass_k=(1, 2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report.step == 3
    assert report.accuracy == 0.5
    assert report.avg_at_k == {2: pytest.approx(0.25)}
    assert report.pass_at_k == {1: pytest.approx(0.25), 2: pytest.approx(0.5)}
    assert report.mean_tokens == 4.0
    assert report.ungraded == 0
    assert report.heldout is None
    assert seen == [(done, 6) for done in range(1, 7)]
    assert len(sampler.ended) == 6


async def test_evaluation_without_samples_has_no_pass_at_k() -> None:
    report = await evaluated(Answering(RIGHT), [problem("5")])
    assert (report.accuracy, report.avg_at_k, report.pass_at_k) == (1.0, {}, {})


async def test_answer_past_the_limit_does_not_count() -> None:
    report = await evaluated(Answering(RIGHT), [problem("5")], max_tokens=2)
    assert (report.accuracy, report.mean_tokens) == (0.0, 2.0)


async def test_what_the_grader_cannot_grade_is_counted_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ExactGrader, "grade", lambda _, pairs: [True, None][: len(pairs)])
    report = await evaluated(Answering(RIGHT), [problem("5"), problem("6")])
    assert (report.accuracy, report.ungraded) == (1.0, 1)


async def test_text_without_answers_is_scored_by_the_teacher_alone() -> None:
    sessions: list[ScriptedSession] = []
    sampler = Answering({})
    problems = [problem("5", None), problem("6", None)]
    report = await evaluated(sampler, problems, pass_k=(2,), scored_by=scoring(0.9, sessions))
    assert sampler.drawn == [("5", 0.9, 1), ("6", 0.9, 1)]
    assert (report.accuracy, report.ungraded, report.pass_at_k) == (None, None, {})
    assert report.heldout is not None
    assert report.heldout.responses == 2
    assert report.heldout.length == 4.0
    assert report.heldout.end_rate == 1.0
    logprobs = np.concatenate([teacher_rows(s.spans[0]).token_logprobs for s in sessions])
    assert report.heldout.teacher_logprob == pytest.approx(float(logprobs.mean()))
    # The sampler says -1 of every token.
    assert report.heldout.sampled_reverse_kl == pytest.approx(-1 - float(logprobs.mean()))
    assert report.heldout.student_entropy == 1.0
    assert all(session.num_closed == 1 for session in sessions)
    assert [text.teacher_logprob for text in report.samples] == [
        pytest.approx(float(teacher_rows(session.spans[0]).token_logprobs.mean()))
        for session in sessions
    ]


async def test_a_sample_that_is_graded_is_scored_too_where_both_are_drawn_alike() -> None:
    for temperature, drawn in ((0.7, 3), (0.9, 4)):
        sessions: list[ScriptedSession] = []
        sampler = Answering(RIGHT)
        report = await evaluated(
            sampler, [problem("5")], pass_k=(2,), scored_by=scoring(temperature, sessions)
        )
        assert len(sampler.drawn) == drawn
        assert len(sessions) == 1
        assert report.heldout is not None
        assert report.heldout.responses == 1
        assert report.pass_at_k == {2: 1.0}


async def test_the_teacher_that_stays_away_is_counted() -> None:
    failing = Scoring(
        open_session=lambda _: ScriptedSession(failures={0: NotReadyError("gone")}),
        rules={None: rules(finish_when_absent=True)},
        temperature=0.7,
        num_topk=2,
        overlap_k=2,
    )
    report = await evaluated(Answering(RIGHT), [problem("5")], pass_k=(2,), scored_by=failing)
    assert report.heldout is not None
    assert (report.heldout.unscored, report.heldout.reverse_kl) == (1, None)
    # The sample that was lost with it is not graded, and not wrong.
    assert (report.ungraded, report.avg_at_k) == (1, {2: 0.0})


async def test_a_teacher_that_fails_ends_the_evaluation_and_its_generations() -> None:
    sampler = Answering(RIGHT)
    failing = replace(
        scoring(0.7, []), open_session=lambda _: ScriptedSession(failures={0: EngineError("no")})
    )
    with pytest.raises(EngineError, match="no"):
        await evaluated(sampler, [problem("5"), problem("6")], pass_k=(2,), scored_by=failing)
    assert sampler.running == {}


async def test_texts_are_of_many_problems_before_they_are_of_many_samples() -> None:
    problems = [problem(digit) for digit in "567"]
    report = await evaluated(Answering(RIGHT), problems, pass_k=(2,), num_texts=4)
    assert [(text.prompt_id, text.sample) for text in report.samples] == [
        ("q5", 0), ("q5", 1), ("q6", 0), ("q7", 0),
    ]  # fmt: skip
    first = report.samples[0]
    assert (first.response, first.correct, first.answer) == ("a#5", True, "5")
    assert (first.prompt, first.tokens, first.finish) == ("5", 4, "stop")


def test_problem_without_an_answer_among_others_is_named() -> None:
    with pytest.raises(DatasetError, match=r"^q6: no answer .* 1 of 2 problems"):
        check_problems([problem("5"), problem("6", None)], GRADER)
    check_problems([problem("5", None), problem("6", None)], GRADER)
