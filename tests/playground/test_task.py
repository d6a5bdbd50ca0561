"""The playground's task, checker and tokenizer. Run: pytest tests/playground."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.playground.task import (
    MODULUS,
    PROMPT_LENGTH,
    SPELLINGS,
    SYMBOLS,
    TRAINING_ROUNDS,
    Operation,
    Problem,
    canonical,
    draw_problem,
    draw_split,
    first_wrong_step,
    has_right_answer,
    is_heldout,
    parse_prompt,
    spell,
)

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "playground" / "checkpoints"
EXAMPLE = Problem(37, (Operation("+", 4), Operation("*", 3), Operation("-", 8)), 2)
EXAMPLE_SOLUTION = "01:37+4=41*3=23-8=15;02:15+4=19*3=57-8=49;#49"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINTS / name)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_normalises_to_its_symbol(spelling: str) -> None:
    assert [unicodedata.normalize("NFKC", character) for character in spelling] == list(SYMBOLS)


def test_spellings_share_no_character() -> None:
    assert len(set("".join(SPELLINGS))) == len(SPELLINGS) * len(SYMBOLS)


def test_example_is_written_out_as_documented() -> None:
    assert EXAMPLE.prompt == "37+4*3-8x02>"
    assert EXAMPLE.solution == EXAMPLE_SOLUTION
    assert EXAMPLE.answer == "49"
    assert parse_prompt(EXAMPLE.prompt) == EXAMPLE


@pytest.mark.parametrize("prompt", ["", "37+4*3x02>", "37+4*3-8x2>", "37/4*3-8x02>"])
def test_a_text_that_is_no_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not a prompt"):
        parse_prompt(prompt)


@pytest.mark.parametrize("num_rounds", [1, 5, TRAINING_ROUNDS])
def test_checker_accepts_generated_solutions_in_any_spelling(num_rounds: int) -> None:
    rng = random.Random(num_rounds)
    for _ in range(50):
        problem = draw_problem(rng, num_rounds)
        response = spell(problem.solution, rng)
        assert canonical(response) == problem.solution
        assert has_right_answer(problem, response)
        assert first_wrong_step(problem, response) is None


def test_checker_rejects_every_single_digit_corruption() -> None:
    for offset, symbol in enumerate(EXAMPLE_SOLUTION):
        if not symbol.isdigit():
            continue
        digit = str((int(symbol) + 1) % 10)
        corrupted = EXAMPLE_SOLUTION[:offset] + digit + EXAMPLE_SOLUTION[offset + 1 :]
        wrong = first_wrong_step(EXAMPLE, corrupted)
        assert wrong is not None
        assert wrong.offset <= offset < wrong.offset + len(wrong.expected)


@pytest.mark.parametrize(
    ("right", "wrong", "name"),
    [
        ("01:37", "01:38", "round 1, opening"),
        ("*3=23", "*3=24", "round 1, operation 2"),
        ("02:15", "03:15", "round 2, opening"),
        ("-8=49", "-7=50", "round 2, operation 3"),
        ("#49", "#50", "answer"),
        ("#49", "", "answer"),
        ("#49", "#49#49", "after the answer"),
    ],
)
def test_checker_names_the_first_wrong_step(right: str, wrong: str, name: str) -> None:
    step = first_wrong_step(EXAMPLE, EXAMPLE_SOLUTION.replace(right, wrong))
    assert step is not None
    assert step.name == name


def test_right_answer_needs_the_last_two_digits_only() -> None:
    assert has_right_answer(EXAMPLE, "01:37+4=99;＃⁴9")
    assert not has_right_answer(EXAMPLE, "01:37+4=41;#48")
    assert not has_right_answer(EXAMPLE, "49")


def test_generator_is_deterministic_by_seed() -> None:
    drawn = [draw_split(random.Random(seed), 20, 3, heldout=False) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_no_round_collapses_values() -> None:
    rng = random.Random(0)
    for _ in range(20):
        operations = draw_problem(rng, 1).operations
        answers = {Problem(start, operations, 1).answer for start in range(MODULUS)}
        assert len(answers) == MODULUS


def test_split_side_does_not_depend_on_the_number_of_rounds() -> None:
    rng = random.Random(0)
    for _ in range(200):
        problem = draw_problem(rng, 1)
        longer = Problem(problem.start, problem.operations, TRAINING_ROUNDS)
        assert is_heldout(problem) == is_heldout(longer)


def test_problem_files_hold_disjoint_problems_of_the_training_length() -> None:
    keys = {}
    for name in ("train", "heldout"):
        lines = (CHECKPOINTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        problems = [parse_prompt(record["prompt"]) for record in records]
        assert [problem.solution for problem in problems] == [r["solution"] for r in records]
        assert [problem.answer for problem in problems] == [r["answer"] for r in records]
        assert {problem.num_rounds for problem in problems} == {TRAINING_ROUNDS}
        keys[name] = {problem.key for problem in problems}
        assert len(keys[name]) == len(problems)
    assert len(keys["train"]) >= 4000
    assert len(keys["heldout"]) >= 256
    assert keys["train"].isdisjoint(keys["heldout"])


def test_tokenizer_round_trips_one_token_a_character() -> None:
    tokenizer, rng = load_tokenizer("teacher"), random.Random(0)
    text = EXAMPLE.prompt + spell(EXAMPLE.solution, rng) + "".join(SPELLINGS)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids
    assert len(tokenizer(EXAMPLE.prompt).input_ids) == PROMPT_LENGTH


def test_tokenizer_knows_its_special_tokens() -> None:
    tokenizer = load_tokenizer("student")
    ids = tokenizer("#49" + tokenizer.eos_token).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "#49"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_teacher_and_student_share_one_tokenizer() -> None:
    teacher, student = (
        (CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in ("teacher", "student")
    )
    assert teacher == student
    config = json.loads((CHECKPOINTS / "student" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(load_tokenizer("student"))
