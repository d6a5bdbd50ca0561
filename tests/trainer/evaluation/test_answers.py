"""Finding an answer and comparing it as text or number.

Run: python -m pytest tests/trainer/evaluation/test_answers.py
"""

from __future__ import annotations

from decimal import Decimal

import pytest

from student_trainer.errors import DatasetError
from student_trainer.evaluation.answers import AnswerFinder, last_boxed, plain_number, same
from student_trainer.evaluation.grading import ExactGrader
from tests.trainer.in_memory import prompt


def exact(pattern: str | None = None, *, unicode_normalize: bool = False) -> ExactGrader:
    return ExactGrader(AnswerFinder(pattern, unicode_normalize=unicode_normalize))


def right(grader: ExactGrader, response: str, answer: str) -> bool | None:
    (grade,) = grader.grade([(response, answer)])
    return grade


@pytest.mark.parametrize(
    ("response", "expected"),
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
def test_last_match_is_the_answer(response: str, expected: bool) -> None:
    assert right(exact(r"#(\d+)"), response, " 3 ") is expected


def test_unicode_forms_are_equal_only_when_normalized() -> None:
    response, answer = "#①②", "12"
    assert not right(exact(r"#(\w+)"), response, answer)
    assert right(exact(r"#(\w+)", unicode_normalize=True), response, answer)
    assert right(exact(r"#(\w+)", unicode_normalize=True), "#12", "①②")


def test_first_group_counts_when_there_are_more() -> None:
    assert right(exact(r"#((\d)\d)"), "#34", "34")


def test_optional_group_that_did_not_match_is_wrong() -> None:
    assert right(exact(r"#(\d)?"), "#", "3") is False


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{18.0}", "18"),
        (r"\boxed{18}", "18.0"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{1000}", "1,000"),
        (r"\boxed{1\,000{,}000}", "1000000"),
        (r"\boxed{$-5$}", "−5"),
        (r"\boxed{\$18}", "18"),
        (r"\boxed{.50}", "0.5"),
        (r"\boxed{1e3}", "1000"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1}, no: \boxed {2}", "2"),
        (r"\boxed{2} and then \boxed{3", "2"),
        (r"\fbox{f\left(\frac{a}{b_{1}}\right)}", r"f\left(\frac{a}{b_{1}}\right)"),
    ],
)
def test_right_answers_are_right(response: str, answer: str) -> None:
    assert right(exact(), response, answer) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{18.5}", "18"),
        (r"\boxed{1,000}", "1"),
        (r"\boxed{1,00}", "100"),
        (r"\boxed{7}", "007"),
        (r"\boxed{5}", "-5"),
        (r"\boxed{}", "0"),
        ("18", "18"),
        (r"\boxed{18", "18"),
    ],
)
def test_other_answers_are_not(response: str, answer: str) -> None:
    assert right(exact(), response, answer) is False


def test_numbers_are_found_with_a_pattern_of_ones_own_too() -> None:
    assert right(exact(r"#### (.+)"), "#### 1,234.50", "1234.5")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18.", "18"), ("0", "0"), ("1,234,567.5", "1234567.5"), ("+7", "7"), ("2.5E-3", "0.0025"),
        ("007", None), ("1,2", None), ("", None), (".", None), ("-", None), ("e3", None),
        ("1 000", None), ("12a", None), ("NaN", None), ("inf", None), ("1/2", None),
    ],
)  # fmt: skip
def test_a_plain_number_is_that_and_nothing_else(text: str, number: str | None) -> None:
    assert plain_number(text) == (None if number is None else Decimal(number))


def test_sameness_needs_no_number() -> None:
    assert same(" yes ", "yes")
    assert not same("Yes", "yes")


def test_a_box_that_is_never_closed_is_none() -> None:
    assert last_boxed(r"\boxed{\boxed{1}") == "1"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None


@pytest.mark.parametrize(
    ("pattern", "answer", "why"),
    [
        (None, "  ", "is empty"),
        (None, "a}", r"has braces that no \\boxed{} can hold"),
        (r"#(\d+)", "twelve", r"is not what the group of eval.answer_pattern '#\(\\\\d\+\)' can"),
        ("^(.+)$", "two\nlines", "is not what the group"),
    ],
)
def test_an_answer_that_no_response_can_give_is_named_before_the_run(
    pattern: str | None, answer: str, why: str
) -> None:
    problems = [prompt(5, answer="3"), prompt(6, 7, answer=answer)]
    with pytest.raises(DatasetError, match=rf"^6-7: the answer .*{why}.*: mend the row"):
        exact(pattern).check(problems)


@pytest.mark.parametrize(
    ("pattern", "answer"),
    [
        (r"#(\d+)", "1,000"),
        (r"#(\d+)", "18.0"),
        (r"(\w)", "7"),
        ("^(.+)$", "5=③+2"),
        (r"#([(\d)]+)", "(3)"),
        (r"<(a|b)>", "b"),
        (r"(?:x|y)=(\S+)\b", "anything"),
        (r"(^\d+$)", "twelve is not checked: the group depends on what is around it"),
        (None, r"\frac{1}{2}"),
    ],
)
def test_an_answer_that_can_be_given_is_taken(pattern: str | None, answer: str) -> None:
    exact(pattern).check([prompt(5, answer=answer)])
