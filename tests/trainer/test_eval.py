"""Grading, pass@k, evaluation. Run: python -m pytest tests/trainer/test_eval.py"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from student_trainer.errors import DatasetError
from student_trainer.eval import Grader, evaluate, pass_at_k
from student_trainer.records import Prompt, SamplingOptions
from tests.trainer.in_memory import EOS_ID, InMemorySampler
from tests.trainer.learner.tiny_student import character_tokenizer

TOKENIZER = character_tokenizer()
GRADER = Grader(r"#(\d+)", unicode_normalize=False)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("1+2=3#3", True),
        ("#3 ", True),
        ("#4 no, #3", True),
        ("#3 no, #4", False),
        ("3", False),
        ("", False),
        ("#33", False),
    ],
)
def test_last_match_is_the_answer(response: str, right: bool) -> None:
    assert GRADER.correct(response, " 3 ") is right


def test_unicode_forms_are_equal_only_when_normalized() -> None:
    response, answer = "#①②", "12"
    assert not Grader(r"#(\w+)", unicode_normalize=False).correct(response, answer)
    assert Grader(r"#(\w+)", unicode_normalize=True).correct(response, answer)
    assert Grader(r"#(\w+)", unicode_normalize=True).correct("#12", "①②")


def test_first_group_counts_when_there_are_more() -> None:
    assert Grader(r"#((\d)\d)", unicode_normalize=False).correct("#34", "34")


def test_optional_group_that_did_not_match_is_wrong() -> None:
    assert not Grader(r"#(\d)?", unicode_normalize=False).correct("#", "3")


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


class Answering(InMemorySampler):
    """Answers the prompt's own digit when `right` says so for prompt and seed, else x."""

    def __init__(self, right: dict[tuple[str, float, int], bool]) -> None:
        super().__init__(tokens_per_delta=2)
        self.right = right

    def draw(
        self, prompt_ids: NDArray[np.int32], options: SamplingOptions
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        digit = TOKENIZER.decode(prompt_ids.tolist())
        right = self.right[digit, options.temperature, options.seed or 0]
        text = f"a#{digit}" if right else "a#x"
        ids = np.array([*TOKENIZER(text)["input_ids"], EOS_ID], np.int32)[: options.max_tokens]
        return ids, np.empty((len(ids), 0), np.int32), np.zeros(len(ids), np.float32)


def problem(digit: str) -> Prompt:
    ids = np.array(TOKENIZER(digit)["input_ids"], np.int32)
    return Prompt(prompt_id=digit, text=digit, token_ids=ids, answer=digit)


RIGHT = {
    ("5", 0.0, 0): True, ("5", 0.7, 1): True, ("5", 0.7, 2): False,
    ("6", 0.0, 0): False, ("6", 0.7, 1): False, ("6", 0.7, 2): False,
}  # fmt: skip


async def test_evaluation_counts_greedy_answers_and_samples_apart() -> None:
    seen: list[tuple[int, int]] = []
    sampler = Answering(RIGHT)
    result = await evaluate(
        sampler,
        [problem("5"), problem("6")],
        GRADER,
        TOKENIZER,
        name="x",
        max_tokens=20,
        num_samples=2,
        temperature=0.7,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.accuracy == 0.5
    assert result.pass_at_1 == pytest.approx(0.25)
    assert result.pass_at_k == pytest.approx(0.5)
    assert result.num_prompts == 2
    assert result.mean_tokens == 4.0
    assert seen == [(done, 6) for done in range(1, 7)]
    assert len(sampler.ended) == 6


async def test_evaluation_without_samples_has_no_pass_at_k() -> None:
    result = await evaluate(
        Answering(RIGHT), [problem("5")], GRADER, TOKENIZER, name="x", max_tokens=20
    )
    assert (result.accuracy, result.pass_at_1, result.pass_at_k) == (1.0, None, None)


async def test_answer_past_the_limit_does_not_count() -> None:
    result = await evaluate(
        Answering(RIGHT), [problem("5")], GRADER, TOKENIZER, name="x", max_tokens=2
    )
    assert (result.accuracy, result.mean_tokens) == (0.0, 2.0)


async def test_problem_without_an_answer_is_named_before_anything_is_generated() -> None:
    sampler = Answering(RIGHT)
    unanswered = Prompt(prompt_id="q7", text="", token_ids=problem("6").token_ids, answer=None)
    with pytest.raises(DatasetError, match="q7"):
        await evaluate(
            sampler, [problem("5"), unanswered], GRADER, TOKENIZER, name="x", max_tokens=20
        )
    assert sampler.seeds == {}


async def test_evaluating_nothing_is_an_error_and_not_a_nan() -> None:
    with pytest.raises(DatasetError, match=r"no problems to evaluate.*data\.heldout"):
        await evaluate(Answering(RIGHT), [], GRADER, TOKENIZER, name="x", max_tokens=20)
