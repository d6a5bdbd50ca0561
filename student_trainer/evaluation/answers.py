"""What a response answers, and whether that is the expected text or number. Standard library only.

A number is the same however it is written (`18`, `18.0`, `1,000`, `1e3`, `$18`), unless it begins
with a zero that says something (`007`): such a text is compared as it is.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
MINUS_SIGNS = str.maketrans({"−": "-", "‐": "-", "–": "-"})
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
"""Of LaTeX's mathematics."""
SEPARATORS = re.compile(r"\{,\}|\\[,!;:]")
"""LaTeX's ways to group digits."""
NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[1-9]\d{0,2}(?:,\d{3})+|0|[1-9]\d*|(?=\.\d))"
    r"(?:\.(?P<part>\d*))?(?:[eE](?P<exponent>[+-]?\d{1,4}))?"
)


class AnswerFinder:
    """Finds the answer in a response."""

    def __init__(self, pattern: str | None, *, unicode_normalize: bool) -> None:
        r"""`pattern` has a group; without one the answer is what the last `\boxed{}` holds, braces
        within it included."""
        self._pattern = None if pattern is None else re.compile(pattern)
        self._normalize = unicode_normalize

    def find(self, response: str) -> str | None:
        """The last answer, None where there is none."""
        text = self.written(response)
        if self._pattern is None:
            return last_boxed(text)
        found = [match[1] for match in self._pattern.finditer(text)]
        return found[-1].strip() if found and found[-1] is not None else None

    def written(self, text: str) -> str:
        """A text as it is compared."""
        return unicodedata.normalize("NFKC", text) if self._normalize else text

    def never_found(self, answer: str) -> str | None:
        """Why no response can ever give this answer, in words; None where one can."""
        text = self.written(answer).strip()
        if not text:
            return "is empty"
        if self._pattern is None:
            balanced = last_boxed(rf"\boxed{{{text}}}") == text
            return None if balanced else r"has braces that no \boxed{} can hold"
        group = _group(self._pattern.pattern)
        number = plain_number(text)
        ways = [text] if number is None else [text, f"{number:f}", f"{number.normalize():f}"]
        if group is None or any(group.fullmatch(way) for way in ways):
            return None
        return f"is not what the group of eval.answer_pattern {self._pattern.pattern!r} can hold"


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds; an escaped brace is no brace."""
    for start in reversed([match.end() for match in BOX.finditer(text)]):
        depth, position = 1, start
        while position < len(text):
            character = text[position]
            if character == "\\":
                position += 2
                continue
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start:position].strip()
            position += 1
    return None


def same(found: str, expected: str) -> bool:
    """Whether two answers are one text, or one number."""
    found, expected = found.strip(), expected.strip()
    if found == expected:
        return True
    number = plain_number(found)
    return number is not None and number == plain_number(expected)


def plain_number(text: str) -> Decimal | None:
    """The number that a text is and nothing else, None where it is more or less than one."""
    text = SEPARATORS.sub(",", without_delimiters(text.translate(MINUS_SIGNS)))
    sign = text[:1] if text[:1] in ("+", "-") else ""
    text = sign + text.removeprefix(sign).removeprefix("\\").removeprefix("$")
    match = NUMBER.fullmatch(text)
    if match is None:
        return None
    whole = match["whole"].replace(",", "") or "0"
    return Decimal(f"{match['sign']}{whole}.{match['part'] or '0'}e{match['exponent'] or '0'}")


def without_delimiters(text: str) -> str:
    """A formula without the signs that begin and end one, and without space around it."""
    text = text.strip()
    for begin, end in DELIMITERS:
        if text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end):
            return text.removeprefix(begin).removesuffix(end).strip()
    return text


def _group(pattern: str) -> re.Pattern[str] | None:
    """What the first group of a regular expression matches by itself; None where that depends on
    what is around it, or it is too involved to tell."""
    start = re.search(r"(?<!\\)\((?!\?)", pattern)
    if start is None:
        return None
    depth, position, in_class = 0, start.start(), False
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 2
            continue
        in_class = character != "]" if in_class else character == "["
        depth += 0 if in_class else (character == "(") - (character == ")")
        if depth == 0:
            break
        position += 1
    inner = pattern[start.end() : position]
    if re.search(r"\(\?|\\[1-9bB]|\^|\$", inner):
        return None
    try:
        return re.compile(inner)
    except re.error:
        return None
