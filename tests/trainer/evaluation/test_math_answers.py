"""Which answers are the same mathematics, without processes.

Run: python -m pytest tests/trainer/evaluation/test_math_answers.py
"""

from __future__ import annotations

import pytest

from student_trainer.evaluation.math_answers import equal, readable

SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    ("18.0", "18"),
    ("1{,}000", "1000"),
    ("0.333333", "1/3"),
    (r"50\%", "0.5"),
    (r"50 \text{ percent}", r"\frac{1}{2}"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2,1", "1,2"),
    ("2,1", r"\{1, 2\}"),
    (r"-2 \text{ or } 2", r"\pm 2"),
    (r"3-\sqrt2, 3+\sqrt2", r"3\pm\sqrt{2}"),
    (r"(3, \pi/2)", r"\left(3,\frac{\pi}{2}\right)"),
    ("[1,2)", "[1, 2)"),
    (r"(2,\infty)\cup(-\infty,1)", r"(-\infty,1)\cup(2,\infty)"),
    (r"1\le x\le 2", "[1,2]"),
    ("x<1", r"(-\infty,1)"),
    ("5", "x=5"),
    ("1, 2", "x=1, y=2"),
    (r"5\text{ cm}", "5"),
    (r"5\text{ cm}^2", "5 cm^2"),
    ("90 degrees", r"90^\circ"),
    ("1 1/2", r"\frac{3}{2}"),
    (r"\text{(B)}", "B"),
    ("east", r"\text{East}"),
    ("1234, 5678", "1,234, 5,678"),
    ("2024-05-01", "2024-05-01"),
]
"""Found, expected."""
DIFFERENT = [
    (r"50\%", "50"),
    ("50", r"50\%"),
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", "(1,2)"),
    ("(1,2)", "1,2"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "[1,2)"),
    ("(2,1)", "(1,2)"),
    ("1,2", "1,1,2"),
    ("2, 1", "x=1, y=2"),
    ("5 m", "5 cm"),
    (r"5\text{ cm}^3", r"5\text{ cm}^2"),
    ("0.0000002", "0.0000001"),
    (r"2\cdot10^{-20}", "10^{-20}"),
    ("0.1000004", "0.1"),
    ("0.333", "1/3"),
    ("seat", "east"),
    ("101", "101_2"),
    ("2022", "2025-01-02"),
    (r"\frac{2}{5}", "12:30"),
    ("2:30 am", "2:30 pm"),
    ("5", "2 3"),
    ("1.2", "1,2"),
    ("100200", "100, 200"),
    ("x=5", "y=5"),
    ("5", "x>5"),
    ("x>5", r"x \ge 5"),
    ("5", "-5"),
    ("C", "B"),
    ("yes", "no"),
    ("", "5"),
]
"""Found, expected; math-verify 0.9 takes the first sixteen and some others for equal."""


@pytest.mark.parametrize(("found", "expected"), SAME)
def test_the_same_mathematics_is_equal(found: str, expected: str) -> None:
    assert equal(found, expected)


@pytest.mark.parametrize(("found", "expected"), DIFFERENT)
def test_other_mathematics_is_not(found: str, expected: str) -> None:
    assert not equal(found, expected)


@pytest.mark.parametrize("answer", ["B", "18", r"\frac{1}{2}", "(1,2)", "no solution", r"x \le 3"])
def test_answers_that_can_be_read(answer: str) -> None:
    assert readable(answer)


@pytest.mark.parametrize("answer", [r"A \cup B", r"0.\overline{3}", "", "???"])
def test_answers_that_cannot(answer: str) -> None:
    assert not readable(answer)
