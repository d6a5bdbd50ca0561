r"""Whether two answers are the same mathematics: math-verify, but for pairs that it calls equal and
that are not.

Departures from math-verify 0.9, each a row of tests/trainer/evaluation/test_math_answers.py:

- 50 % is 1/2 and not 50 (it takes either).
- A list is compared by its brackets, its length and its elements: (1, 2) is a pair or an open
  interval and not the set {1, 2}, and 1, 1, 2 is not 1, 2. Without brackets and in braces order is
  free; in others it counts.
- 5 cm is not 5 m (it drops units); 5 cm is 5.
- Numbers are compared by their relative difference (it rounds to six decimals, so that 1e-7 is
  2e-7); two that are both written out must be the same.
- Words, dates, times, numbers to a base and numbers beside one another are compared as texts (it
  multiplies the letters of `east`, which is then `seat`; takes 2025-01-02 for 2022 and 12:30 for
  2/5; drops the base of 101_2; makes 5 of `2 3`).

Slow, at times for ever, and at home in a process of its own: math_worker.py.
"""

from __future__ import annotations

import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from student_trainer.evaluation import answers

MAX_RELATIVE_DIFFERENCE = 1.01e-6
"""0.333333 is a third; 0.1 and 0.1000004 differ."""
DIGITS = 30

_REWRITTEN = (
    (re.compile(r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\%|\s*\\(?:text|mathrm)\{\s*(?:percent|\\%|%)\s*\}|\s+percent\b"), "%"),
    (re.compile(r"\\(?:text|mathrm)\{\s*(?:,?\s*(?:and|or))\s*\}|,?\s+(?:and|or)\s+"), ","),
    (re.compile(r"(?<![\d\w])(\d+)\s+(\d+)/(\d+)(?![\d\w])"), r"\1\\frac{\2}{\3}"),
    (re.compile("°"), r"^\\circ"),
)
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(
    r"(?P<number>.*?[\d})])\s*(?:\\(?:text|mathrm|mbox)\s*\{\s*(?P<text>[^{}]*)\}|"
    r"(?<=\d)\s+(?P<word>[A-Za-z]{1,})|(?<=\d)(?P<joined>(?:[kcm]m|kg|mg|ml|cm|Hz|mph)))"
    r"(?P<power>\s*\^\s*\{?\s*-?\d\s*\}?)?"
)
_OPAQUE = tuple(
    re.compile(pattern)
    for pattern in (
        r"[A-Za-z][A-Za-z .'-]*[A-Za-z][A-Za-z .'-]*[A-Za-z]",  # words
        r"\d{4}[-/]\d{1,2}[-/]\d{1,2}|\d{1,2}[-/]\d{1,2}[-/]\d{4}",  # dates
        r"\d{1,2}:\d\d(?::\d\d)?\s*(?:[AaPp]\.?[Mm]\.?)?",  # times
        r".*[0-9A-F)]\s*_\s*\{?\s*\d+\s*\}?",  # numbers to a base
        r"[+-]?[\d.]+(?:\s+[+-]?[\d.]+)+",  # numbers beside one another
    )
)
_RELATION = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|in)(?![A-Za-z])")
_ORDERLESS = ("", "{}")
_CLOSING = {"(": ")]", "[": ")]", "\\{": ("\\}",)}


def equal(found: str, expected: str) -> bool:
    """Whether an answer is the expected one; what cannot be read is equal to the same text only."""
    if answers.same(found, expected):
        return True
    found, expected = _rewritten(found), _rewritten(expected)
    given_brackets, given = _elements(found)
    brackets, gold = _elements(expected)
    if len(gold) == len(given) == 1:
        return _same_value(given[0], gold[0])
    if (len(gold) == 1 or len(given) == 1) and (
        _RELATION.search(found) or _RELATION.search(expected)
    ):
        # An interval, and the inequality that says the same.
        return _verified(found, expected)
    if len(gold) != len(given):
        return False
    orderless = brackets in _ORDERLESS and given_brackets in _ORDERLESS
    if not orderless and brackets != given_brackets:
        return False
    named = [all("=" in element for element in elements) for elements in (gold, given)]
    if not orderless or named[0] != named[1]:
        return all(_same_value(a, b) for a, b in zip(given, gold, strict=True))
    return _same_in_any_order(given, gold)


def readable(answer: str) -> bool:
    """Whether an expected answer is something that a differently written one can equal."""
    _, elements = _elements(_rewritten(answer))
    return all(
        _number(element) is not None or _is_opaque(element) or bool(_parsed(element))
        for element in elements
    )


def _rewritten(text: str) -> str:
    text = answers.without_delimiters(text.translate(answers.MINUS_SIGNS)).removesuffix(".")
    text = answers.SEPARATORS.sub(lambda match: "," if match[0] == "{,}" else " ", text)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    return text.strip()


def _elements(text: str) -> tuple[str, list[str]]:
    """The brackets around a list, "" for none, and what is in it; one element for what is none."""
    if r"\pm" in text or r"\mp" in text:
        signs = (("+", "-"), ("-", "+"))
        return "", [text.replace(r"\pm", plus).replace(r"\mp", minus) for plus, minus in signs]
    for opening, closings in _CLOSING.items():
        closing = next((end for end in closings if text.endswith(end)), None)
        if text.startswith(opening) and closing and _encloses(text, opening, closing):
            inner = _split(text[len(opening) : -len(closing)])
            if len(inner) == 1:
                return _elements(inner[0].strip())
            return (opening + closing).replace("\\", ""), inner
    return "", [text] if _number(text) is not None else _split(text)


def _encloses(text: str, opening: str, closing: str) -> bool:
    """Whether the first bracket is closed by the last."""
    depths = [depth for _, depth in _depths(text)]
    return all(depths[len(opening) - 1 : -len(closing)]) and depths[-1] == 0


def _depths(text: str) -> list[tuple[str, int]]:
    """Each character with the number of brackets that are open after it."""
    depth, found = 0, []
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        found.append((character, depth))
    return found


def _split(text: str) -> list[str]:
    """At the commas and semicolons outside of all brackets; not at those that group digits."""
    if re.search(r",\s", text):
        pieces = re.split(r",\s+", text)
        if all(_number(piece) is not None for piece in pieces):
            return pieces
    parts, current = [], ""
    for character, depth in _depths(text):
        if character in ",;" and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in [*parts, current] if part.strip()] or [text]


def _number(text: str) -> Decimal | None:
    number = answers.plain_number(text.strip().removesuffix("%"))
    return number / 100 if number is not None and text.strip().endswith("%") else number


def _is_opaque(text: str) -> bool:
    return any(pattern.fullmatch(_plain_text(text)) for pattern in _OPAQUE)


def _plain_text(text: str) -> str:
    return " ".join(_TEXT.sub(r"\1", text).split()).casefold()


def _same_in_any_order(given: list[str], gold: list[str]) -> bool:
    left = list(given)
    for element in gold:
        match = next((other for other in left if _same_value(other, element)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_value(found: str, expected: str) -> bool:
    """Of two answers that are no lists."""
    if _plain_text(found) == _plain_text(expected):
        return True
    numbers = _number(found), _number(expected)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if _is_opaque(found) or _is_opaque(expected):
        return False
    found, unit = _without_unit(found)
    expected, expected_unit = _without_unit(expected)
    if unit and expected_unit and unit != expected_unit:
        return False
    if unit or expected_unit:
        return _same_value(found, expected)
    return _verified(found, expected)


def _without_unit(text: str) -> tuple[str, str]:
    match = _UNIT.fullmatch(text.strip())
    if match is None:
        return text, ""
    unit = match["text"] or match["word"] or match["joined"] or ""
    power = re.sub(r"[^\d-]", "", match["power"] or "")
    return match["number"], unit.strip().casefold() + power


def _verified(found: str, expected: str) -> bool:
    from math_verify import verify

    gold, given = _parsed(expected), _parsed(found)
    return any(
        verify(a, b, timeout_seconds=None, allow_set_relation_comp=True) and _close(a, b)
        for a in gold
        for b in given
    )


@lru_cache(maxsize=1024)
def _parsed(text: str) -> list[Any]:
    """What math-verify reads in a formula; nothing where it reads nothing."""
    from math_verify import LatexExtractionConfig, parse

    if text.endswith("%"):
        text = rf"\frac{{{text[:-1]}}}{{100}}"
    if (number := answers.plain_number(text)) is not None:
        text = f"{number:f}"
    read: list[Any] = parse(
        f"${text}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # the process is limited as a whole
    )
    return read


def _close(a: Any, b: Any) -> bool:
    """Two values that math-verify calls equal are, unless they are numbers that differ."""
    a, b = (getattr(value, "rhs", value) for value in (a, b))
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return True
    a, b = a.doit().evalf(DIGITS), b.doit().evalf(DIGITS)
    size = max(abs(a), abs(b))
    return bool(size == 0 or not size.is_finite or abs(a - b) <= MAX_RELATIVE_DIFFERENCE * size)
