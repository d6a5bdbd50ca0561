"""What is said between the student's answers, as ids: pytest tests/trainer/data/test_turns.py"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from student_trainer.data.prompts import Limits, load_prompts
from student_trainer.errors import DatasetError
from student_trainer.records import Prompt
from tests.trainer.data.made_tokenizers import byte_level

STABLE = (
    "{% if tools %}[tools]{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
FORGETS = STABLE.replace(
    "{{ m.content | trim }}", "{{ (m.content.split('#') | last if not loop.last else m.content) }}"
)
"""As Qwen3's: of an earlier answer it drops the reasoning, here what stands before a #."""
ASKED = [{"role": "user", "content": "1 + 2?"}]
MORE = [{"role": "user", "content": "and the cat?"}, {"role": "tool", "content": "mat 3"}]


def chatty(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    return tokenizer


def loaded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, **row: object) -> Prompt:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (found,) = load_prompts(tmp_path / "rows.jsonl", tokenizer, max_prompt_tokens=200)
    return found


def test_prompt_answers_and_turns_are_the_whole_conversation_rendered_at_once(
    tmp_path: Path,
) -> None:
    tokenizer = chatty(STABLE)
    found = loaded(tmp_path, tokenizer, messages=ASKED, turns=MORE)
    answers = ["it is 3", "on the mat"]
    said = [tokenizer(f"{text}</s>", add_special_tokens=False)["input_ids"] for text in answers]
    ids = found.token_ids.tolist()
    for answer_ids, turn_ids in zip(said, found.turns, strict=True):
        assert turn_ids[0] == answer_ids[-1] == tokenizer.eos_token_id
        ids += [*answer_ids, *turn_ids[1:].tolist()]
    first, second = ({"role": "assistant", "content": text} for text in answers)
    whole = tokenizer.apply_chat_template(
        [*ASKED, first, MORE[0], second, MORE[1]], tokenize=False, add_generation_prompt=True
    )
    assert ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_template_that_forgets_reasoning_gives_the_same_turns(tmp_path: Path) -> None:
    first, second = (
        loaded(tmp_path, chatty(template), messages=ASKED, turns=MORE).turns
        for template in (STABLE, FORGETS)
    )
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in second]


def test_turns_without_room_in_the_longest_response_are_refused_or_left_out_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Room is what all of them have, and one token for each answer; a row without any has it."""
    rows, tokenizer = tmp_path / "rows.jsonl", chatty(STABLE)
    two = loaded(tmp_path, tokenizer, messages=ASKED, turns=MORE).turns
    enough = sum(map(len, two)) + 3

    def read(room: int, limits: Limits) -> list[Prompt]:
        return load_prompts(
            rows, tokenizer, max_prompt_tokens=200, max_response_tokens=room, limits=limits
        )

    talks: list[dict[str, object]] = [{"messages": ASKED, "turns": turns} for turns in ([], MORE)]
    rows.write_text("\n".join(map(json.dumps, talks)))
    assert [len(prompt.turns) for prompt in read(enough, Limits())] == [0, 2]
    with pytest.raises(DatasetError) as caught:
        read(enough - 1, Limits())
    assert str(caught.value) == (
        f"{rows}:2: turns of {enough - 3} tokens and one for each of 3 answers do not fit in "
        f"{enough - 1}, the longest response (by budget, held out by eval.max_tokens); "
        'data.too_long = "skip" goes on without such rows'
    )
    skip = Limits(too_long="skip", max_skipped_share=0.5)
    assert [prompt.turns for prompt in read(enough - 1, skip)] == [()]
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "1 of 2 rows are too long and were left out; the first: " in said.getMessage()


def test_switches_hold_for_every_answer(tmp_path: Path) -> None:
    tokenizer = chatty(STABLE)
    found = loaded(
        tmp_path,
        tokenizer,
        messages=ASKED,
        turns=MORE,
        chat_template_kwargs={"enable_thinking": False},
    )
    for ids in (found.token_ids, *found.turns):
        assert tokenizer.decode(ids).endswith("[assistant]<think></think>")


def test_a_row_without_turns_has_none(tmp_path: Path) -> None:
    for row in ({}, {"turns": None}, {"turns": []}):
        assert loaded(tmp_path, chatty(STABLE), messages=ASKED, **row).turns == ()


LEAVES_OUT = STABLE.replace("[{{ m.role }}]", "{% if m.role == 'tool' %}{% continue %}{% endif %}")


@pytest.mark.parametrize(
    ("row", "template", "reason"),
    [
        ({"prompt": "1", "turns": MORE}, STABLE, "turns go on with a conversation, the problem is"),
        ({"prompt_ids": [3], "turns": MORE}, STABLE, "turns go on with a conversation"),
        ({"messages": ASKED, "turns": "more"}, STABLE, "turns must be a list of messages, is str"),
        (
            {"messages": ASKED, "turns": [{"role": "assistant", "content": "3"}]},
            STABLE,
            "turns[0].role is 'assistant', must be user or tool",
        ),
        (
            {"messages": ASKED, "turns": [MORE[0], {"from": "human"}]},
            STABLE,
            "turns[1] needs role and content, has from",
        ),
        (
            {"messages": ASKED, "turns": MORE},
            LEAVES_OUT,
            "turns[1]: the chat template does not write a tool message after an answer",
        ),
        (
            {"messages": ASKED, "turns": MORE},
            "{{ raise_exception('no tool') if messages[-1].role == 'tool' else messages }}",
            "turns[1]: the chat template refuses",
        ),
    ],
)
def test_turns_that_cannot_be_are_refused_by_name(
    tmp_path: Path, row: dict[str, object], template: str, reason: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        loaded(tmp_path, chatty(template), **row)
    assert reason in str(caught.value)
