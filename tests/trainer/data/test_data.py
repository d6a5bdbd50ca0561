"""Prompts, their order, and masks. Run: python -m pytest tests/trainer/data/test_data.py"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data import PromptOrder, load_prompts
from student_trainer.errors import CheckpointError, DatasetError
from student_trainer.pretrained import load_tokenizer
from student_trainer.special_tokens import SpecialTokens
from tests.trainer.in_memory import prompt
from tests.trainer.learner.tiny_student import character_tokenizer

TOKENIZER = character_tokenizer()


def dataset(tmp_path: Path, *lines: str) -> Path:
    """A dataset of these lines."""
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_line_becomes_a_prompt(tmp_path: Path) -> None:
    path = dataset(
        tmp_path, '{"prompt": "1+2", "answer": 3, "id": "a"}', "", '{"prompt": "ab", "more": 1}'
    )
    first, second = load_prompts(path, TOKENIZER, max_prompt_tokens=3)
    assert (first.prompt_id, first.text, first.answer) == ("a", "1+2", "3")
    assert TOKENIZER.decode(first.token_ids.tolist()) == "1+2"
    assert first.token_ids.dtype == np.int32
    assert (second.prompt_id, second.answer) == (f"{path}:3", None)


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a>{% endif %}"
    )
    path = dataset(tmp_path, '{"messages": [{"role": "user", "content": "1+2"}]}')
    (loaded,) = load_prompts(path, tokenizer, max_prompt_tokens=20)
    assert loaded.text == "u>1+2\na>"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "must be an object"),
        ("3", "must be an object"),
        ('{"question": "1", "answer": "2"}', r"needs `prompt` .*has \['answer', 'question'\]"),
        ('{"prompt": 5}', "prompt must be text or a list of messages, is int 5"),
        ('{"prompt": "12345"}', "the prompt has 5 tokens, must be 1 to 4"),
        ('{"prompt": ""}', "the prompt has 0 tokens, must be 1 to 4"),
        ('{"messages": [{"role": "user", "content": "1"}]}', "chat template"),
    ],
)
def test_bad_line_is_named_with_file_number_and_limit(
    tmp_path: Path, bad: str, reason: str
) -> None:
    path = dataset(tmp_path, '{"prompt": "1"}', bad)
    with pytest.raises(DatasetError, match=re.escape(f"{path}:2: ") + ".*" + reason):
        load_prompts(path, TOKENIZER, max_prompt_tokens=4)


def test_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing\.jsonl: no such dataset"):
        load_prompts(tmp_path / "nothing.jsonl", TOKENIZER, max_prompt_tokens=4)


def test_empty_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data\.jsonl: the dataset is empty"):
        load_prompts(dataset(tmp_path, "", "  "), TOKENIZER, max_prompt_tokens=4)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_order_is_determined_by_the_seed() -> None:
    prompts = [prompt(i) for i in range(2, 12)]
    one, same, other = (PromptOrder(prompts, prompts_per_step=4, seed=s) for s in (3, 3, 4))
    steps = [[p.prompt_id for p in order.step(s)] for order in (one, same) for s in range(6)]
    assert steps[:6] == steps[6:]
    assert steps[:6] != [[p.prompt_id for p in other.step(s)] for s in range(6)]


@settings(deadline=None)
@given(num_prompts=st.integers(1, 12), passes=st.integers(1, 3), per_step=st.integers(1, 12))
def test_a_pass_takes_no_prompt_twice_and_all_of_them_when_it_divides(
    num_prompts: int, passes: int, per_step: int
) -> None:
    per_step = min(per_step, num_prompts)
    order = PromptOrder([prompt(i) for i in range(num_prompts)], prompts_per_step=per_step, seed=0)
    steps = num_prompts // per_step
    for number in range(passes):
        taken = Counter(
            p.prompt_id for s in range(number * steps, (number + 1) * steps) for p in order.step(s)
        )
        assert set(taken.values()) == {1}
        assert len(taken) == steps * per_step


def test_passes_differ() -> None:
    order = PromptOrder([prompt(i) for i in range(20)], prompts_per_step=20, seed=0)
    assert [p.prompt_id for p in order.step(0)] != [p.prompt_id for p in order.step(1)]


def test_more_prompts_a_step_than_there_are_is_refused() -> None:
    with pytest.raises(DatasetError, match="prompts_per_step is 3, the dataset has 2"):
        PromptOrder([prompt(2), prompt(3)], prompts_per_step=3, seed=0)


def test_first_occurrence_of_each_special_token_is_masked() -> None:
    mask = SpecialTokens([7, 9], first_only=True).mask(np.array([7, 5, 9, 7, 9], np.int32))
    assert mask.tolist() == [False, True, False, True, True]


def test_all_occurrences_are_masked_when_asked() -> None:
    mask = SpecialTokens([7, 9], first_only=False).mask(np.array([7, 5, 9, 7, 9], np.int32))
    assert mask.tolist() == [False, True, False, False, False]


def test_no_special_tokens_mask_nothing() -> None:
    assert SpecialTokens([], first_only=True).mask(np.array([7, 5], np.int32)).all()
    assert SpecialTokens([7], first_only=True).mask(np.empty(0, np.int32)).shape == (0,)


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), max_size=20),
    special=st.sets(st.integers(0, 5)),
    first_only=st.booleans(),
    cut=st.integers(0, 20),
)
def test_mask_of_a_prefix_is_a_prefix_of_the_mask(
    ids: list[int], special: set[int], first_only: bool, cut: int
) -> None:
    tokens = SpecialTokens(sorted(special), first_only=first_only)
    response = np.array(ids, np.int32)
    assert tokens.mask(response[:cut]).tolist() == tokens.mask(response)[:cut].tolist()
