"""The playground's task: rounds of three operations modulo 100, written out step by step.

A prompt names a start value, three operations and a number of rounds; the solution works through
them, one line a round, and ends with the answer:

    prompt    37+4*3-8x12>
    solution  01:37+4=41*3=23-8=15;02:15+4=19*3=57-8=49; ... #71

Every symbol of a solution may be written in any of three Unicode spellings, drawn independently
with fixed odds, so a teacher has real choices at every position: its top 3 are the three spellings
of the one right symbol. NFKC normalisation maps every spelling back to ASCII; the checker reads
only the normalised text. This module knows nothing about models and imports no torch.
"""

import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

MODULUS = 100
"""Every value is taken modulo this and written with two digits."""

MULTIPLIERS = (3, 7, 9)
"""Operands of `*`. Each is invertible modulo 100, so that rounds never collapse to a few values."""

TRAINING_ROUNDS = 12
"""Rounds of the problems to distil on: 255 solution symbols and the end-of-sequence token."""

SYMBOLS = "0123456789+-*=;#:"
"""Canonical (ASCII) symbols of a solution."""

SPELLINGS = (
    SYMBOLS,
    "０１２３４５６７８９＋－＊＝；＃：",
    "⁰¹²³⁴⁵⁶⁷⁸⁹﹢﹣﹡﹦﹔﹟﹕",
)
"""The three spellings; character i of each is a way to write SYMBOLS[i]."""

SPELLING_ODDS = (0.5, 0.3, 0.2)
"""Odds of the three spellings, the same for every symbol and independent of everything else."""

PROMPT_ONLY_SYMBOLS = "x>"
"""Symbols that occur in prompts only. Prompts are ASCII."""

PROMPT_LENGTH = 12
"""Characters, hence tokens, of every prompt."""

LINE_LENGTH = 21
"""Characters of every solution line."""

_PROMPT = re.compile(r"(\d\d)((?:[+\-*]\d){3})x(\d\d)>")


@dataclass(frozen=True, slots=True)
class Operation:
    """One of the three operations: `symbol` is `+`, `-` or `*`, `operand` one digit."""

    symbol: str
    operand: int

    def apply(self, value: int) -> int:
        """The value after this operation, modulo 100."""
        if self.symbol == "+":
            return (value + self.operand) % MODULUS
        if self.symbol == "-":
            return (value - self.operand) % MODULUS
        return (value * self.operand) % MODULUS

    def __str__(self) -> str:
        return f"{self.symbol}{self.operand}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A start value, three operations, and how many times to apply the three in turn."""

    start: int
    operations: tuple[Operation, ...]
    num_rounds: int

    @property
    def prompt(self) -> str:
        """ASCII prompt of PROMPT_LENGTH characters."""
        operations = "".join(str(operation) for operation in self.operations)
        return f"{self.start:02d}{operations}x{self.num_rounds:02d}>"

    @property
    def answer(self) -> str:
        """The final value, two digits."""
        return self.solution[-2:]

    @property
    def solution(self) -> str:
        """Canonical (ASCII) solution: LINE_LENGTH characters a round, then `#` and the answer."""
        return "".join(text for _, text in solution_steps(self))

    @property
    def key(self) -> tuple[int, tuple[Operation, ...]]:
        """What makes two problems share their solution lines: everything but the length."""
        return self.start, self.operations


@dataclass(frozen=True, slots=True)
class WrongStep:
    """The first step of a response that differs from the solution.

    `name` reads like `round 3, operation 2`; `offset` is the step's first character.
    """

    name: str
    offset: int
    expected: str
    found: str


def solution_steps(problem: Problem) -> Iterator[tuple[str, str]]:
    """(name, canonical text) of each step, in writing order; the texts join to the solution."""
    value = problem.start
    for round_number in range(1, problem.num_rounds + 1):
        yield f"round {round_number}, opening", f"{round_number:02d}:{value:02d}"
        for index, operation in enumerate(problem.operations, start=1):
            value = operation.apply(value)
            yield f"round {round_number}, operation {index}", f"{operation}={value:02d}"
        yield f"round {round_number}, end", ";"
    yield "answer", f"#{value:02d}"


def parse_prompt(prompt: str) -> Problem:
    """The problem a prompt states. Raises ValueError if it is not a prompt of this task."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"not a prompt such as '37+4*3-8x12>': {prompt!r}")
    start, operations, num_rounds = match.groups()
    pairs = (operations[i : i + 2] for i in range(0, len(operations), 2))
    return Problem(int(start), tuple(Operation(p[0], int(p[1])) for p in pairs), int(num_rounds))


def draw_problem(rng: random.Random, num_rounds: int) -> Problem:
    """A problem with uniform start, operation symbols and operands."""
    operations = []
    for _ in range(3):
        symbol = rng.choice("+-*")
        operand = rng.choice(MULTIPLIERS) if symbol == "*" else rng.randint(1, 9)
        operations.append(Operation(symbol, operand))
    return Problem(rng.randrange(MODULUS), tuple(operations), num_rounds)


def is_heldout(problem: Problem) -> bool:
    """Whether a problem belongs to the held-out tenth, whatever its number of rounds.

    Splitting on everything but the length keeps the held-out lines unseen in short problems too.
    """
    return random.Random(f"{problem.start} {problem.operations}").random() < 0.1


def draw_split(
    rng: random.Random, num_problems: int, num_rounds: int, *, heldout: bool
) -> list[Problem]:
    """Distinct problems of one side of the split, in drawing order."""
    problems: dict[tuple[int, tuple[Operation, ...]], Problem] = {}
    while len(problems) < num_problems:
        problem = draw_problem(rng, num_rounds)
        if is_heldout(problem) == heldout:
            problems.setdefault(problem.key, problem)
    return list(problems.values())


def canonical(text: str) -> str:
    """The ASCII reading of a text in any mixture of spellings (Unicode NFKC)."""
    return unicodedata.normalize("NFKC", text)


def spell(text: str, rng: random.Random) -> str:
    """A canonical solution with the spelling of every symbol drawn by SPELLING_ODDS."""
    choices = rng.choices(SPELLINGS, SPELLING_ODDS, k=len(text))
    return "".join(
        alphabet[SYMBOLS.index(symbol)] for alphabet, symbol in zip(choices, text, strict=True)
    )


def has_right_answer(problem: Problem, response: str) -> bool:
    """Whether a response (any spelling, no end-of-sequence token) ends with `#` and the answer."""
    return canonical(response).endswith(f"#{problem.answer}")


def first_wrong_step(problem: Problem, response: str) -> WrongStep | None:
    """The first step that differs from the solution, or None if all of the response is right.

    Text beyond the answer counts as a step of its own, named `after the answer`.
    """
    text, offset = canonical(response), 0
    for name, expected in solution_steps(problem):
        found = text[offset : offset + len(expected)]
        if found != expected:
            return WrongStep(name, offset, expected, found)
        offset += len(expected)
    if offset < len(text):
        return WrongStep("after the answer", offset, "", text[offset:])
    return None
