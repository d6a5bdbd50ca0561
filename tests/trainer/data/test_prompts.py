"""Rows to token ids. Run: python -m pytest tests/trainer/data/test_prompts.py"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from student_trainer.data import Limits, PromptFormat, RowFields, load_prompts
from student_trainer.data.templates import template_of
from student_trainer.errors import DatasetError
from student_trainer.records import Prompt
from tests.trainer.data.made_tokenizers import CHAT_TEMPLATE, byte_level

PLAIN, WITH_BOS = byte_level(), byte_level(adds_bos=True)
HI = [{"role": "user", "content": "hi"}]


def loaded(
    tmp_path: Path,
    *rows: dict[str, Any],
    tokenizer: Any = PLAIN,
    limits: Limits | None = None,
    most: int = 200,
    **form: Any,
) -> list[Prompt]:
    """The prompts of these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return load_prompts(
        path, tokenizer, max_prompt_tokens=most, form=PromptFormat(**form), limits=limits
    )


def text_of(prompt: Prompt) -> str:
    """What the ids say."""
    return str(PLAIN.decode(prompt.token_ids.tolist()))


def refused(tmp_path: Path, row: dict[str, Any], **more: Any) -> str:
    """Why a row is refused; it is the second."""
    with pytest.raises(DatasetError) as caught:
        loaded(tmp_path, {"prompt": "hi"}, row, **more)
    where = f"{tmp_path / 'rows.jsonl'}:2: "
    assert str(caught.value).startswith(where)
    return str(caught.value).removeprefix(where)


@pytest.mark.parametrize(
    ("tokenizer", "add_bos", "expected"),
    [
        (WITH_BOS, None, "<s>hi"),
        (WITH_BOS, True, "<s>hi"),
        (WITH_BOS, False, "hi"),
        (PLAIN, None, "hi"),
        (PLAIN, True, "<s>hi"),
        (PLAIN, False, "hi"),
    ],
)
def test_text_begins_as_the_tokenizer_does_by_itself_or_as_asked(
    tmp_path: Path, tokenizer: Any, add_bos: bool | None, expected: str
) -> None:
    (prompt,) = loaded(tmp_path, {"prompt": "hi"}, tokenizer=tokenizer, add_bos=add_bos)
    assert text_of(prompt) == expected
    (own,) = loaded(tmp_path, {"prompt": "<s>hi"}, tokenizer=tokenizer, add_bos=add_bos)
    assert text_of(own) == "<s>hi"


def test_there_must_be_a_token_of_beginning_to_add(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.bos_token = None
    with pytest.raises(DatasetError, match=r"data\.add_bos is true, but the tokenizer has no"):
        loaded(tmp_path, {"prompt": "hi"}, tokenizer=tokenizer, add_bos=True)


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
@pytest.mark.parametrize("add_bos", [None, True])
def test_a_template_writes_its_own_beginning_once(
    tmp_path: Path, tokenizer: Any, add_bos: bool | None
) -> None:
    (prompt,) = loaded(tmp_path, {"messages": HI}, tokenizer=tokenizer, add_bos=add_bos)
    assert text_of(prompt) == "<s><user>hi\n<assistant>"


def test_a_problem_may_stand_in_any_of_its_fields(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    ids = PLAIN("hi", add_special_tokens=False)["input_ids"]
    prompts = loaded(
        tmp_path,
        {"prompt": HI},
        {"messages": HI},
        {"messages": [{"role": "user", "content": parts}]},
        {"prompt_ids": ids},
        {"prompt": ids, "messages": None},
    )
    assert [text_of(prompt) for prompt in prompts] == ["<s><user>hi\n<assistant>"] * 3 + ["hi"] * 2
    assert prompts[3].text == "hi"


def test_fields_may_have_other_names_and_lie_within_objects(tmp_path: Path) -> None:
    row = {"extra": {"question": "hi"}, "reward_model": {"ground_truth": "007"}, "prompt": "no"}
    fields = RowFields(prompt="extra.question", answer="reward_model.ground_truth")
    (prompt,) = loaded(tmp_path, row, fields=fields)
    assert (prompt.text, prompt.answer) == ("hi", "007")


def test_switches_of_the_template_are_the_rows_or_those_for_all(tmp_path: Path) -> None:
    rows = [{"messages": HI}, {"messages": HI, "chat_template_kwargs": {"enable_thinking": True}}]
    prompts = loaded(tmp_path, *rows, template_kwargs={"enable_thinking": False})
    assert [text_of(prompt).partition("<assistant>")[2] for prompt in prompts] == [
        "<think></think>",
        "",
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    (prompt,) = loaded(tmp_path, {"messages": HI, "tools": tools})
    assert '"name": "add"' in prompt.text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            "messages[0] needs role and content, has from, value",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0] needs role and content, has role"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0].content is empty"),
        (
            {"messages": [{"role": "human", "content": "hi"}]},
            "messages[0].role is str 'human', must be one of system, developer, user",
        ),
        (
            {"messages": [*HI, {"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "messages[1].content[0] must be a part of text",
        ),
        ({"messages": []}, "messages must be a list of messages, is list []"),
        ({"messages": "hi"}, "messages must be a list of messages, is str 'hi'"),
        ({"prompt": "hi", "messages": HI}, "has prompt and messages: data.prompt_field says"),
        ({"prompt_ids": [1, 10**6]}, "prompt_ids has 1000000, the tokenizer has 0 to 2"),
        ({"prompt_ids": [1, -1]}, "prompt_ids has -1, the tokenizer has 0 to 2"),
        ({"prompt_ids": ["a"]}, "prompt_ids must be a list of token ids, is list ['a']"),
        ({"prompt": "\ud800"}, r"prompt holds \ud800, half of a character"),
        ({"prompt": "hi", "answer": ["3"]}, "answer must be text or a number, is list ['3']"),
        ({"prompt": "hi", "answer": True}, "answer must be text or a number, is bool True"),
        ({"prompt": "hi", "id": [1]}, "id must be text or a whole number, is list [1]"),
        ({"prompt": "hi", "teacher": 3}, "teacher must be the name of one, is int 3"),
        (
            {"messages": HI, "chat_template_kwargs": {"enable_thinkng": False}},
            "chat_template_kwargs has 'enable_thinkng', which the chat template does not look at",
        ),
        (
            {"prompt": "hi", "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs and tools are for a chat template, and the problem is plain",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "content": "yes"}]},
            "the conversation ends with",
        ),
        ({"prompt": "hi", "teacher": "maths"}, "teacher 'maths' has no table [teachers.maths]"),
        ({"prompt": "hi", "teacher_prompt": [{"role": "user"}]}, "teacher_prompt[0] needs role"),
        ({"prompt": ""}, "the prompt has 0 tokens, must be 1 to 200"),
    ],
)
def test_a_bad_row_is_named_with_its_field(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    assert refused(tmp_path, row).startswith(reason)


def test_the_last_turn_may_be_the_reference(tmp_path: Path) -> None:
    messages = [*HI, {"role": "assistant", "content": "yes"}]
    prompts = loaded(
        tmp_path,
        {"messages": messages},
        {"messages": messages, "answer": "no"},
        {"messages": [*messages, *HI]},
        final_assistant="reference",
    )
    assert [prompt.answer for prompt in prompts] == ["yes", "no", None]
    assert text_of(prompts[0]) == "<s><user>hi\n<assistant>"
    assert text_of(prompts[2]) == "<s><user>hi\n<assistant>yes\n<user>hi\n<assistant>"
    alone = {"messages": messages[1:]}
    assert "the assistant's turn alone" in refused(tmp_path, alone, final_assistant="reference")


def test_a_system_message_is_put_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, *HI]
    prompts = loaded(tmp_path, {"messages": HI}, {"messages": own}, system="be brief")
    assert [text_of(prompt).partition("<user>")[0] for prompt in prompts] == [
        "<s><system>be brief\n",
        "<s><system>mine\n",
    ]
    with pytest.raises(DatasetError, match=r"rows\.jsonl:1: data\.system goes before convers"):
        loaded(tmp_path, {"prompt": "hi"}, system="be brief")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.value }}{% endfor %}", "leaves out the content of message 0"),
        ("{{ raise_exception('no system role') }}", "the chat template refuses: no system role"),
        ("{{ messages[7].content }}", "the chat template refuses: "),
    ],
)
def test_a_template_that_does_not_take_the_row_is_named(
    tmp_path: Path, template: str, reason: str
) -> None:
    assert reason in refused(tmp_path, {"messages": HI}, chat_template=template)


def test_a_template_is_read_from_a_file_or_a_checkpoint(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path / "checkpoint")
    assert template_of(tmp_path / "checkpoint") == CHAT_TEMPLATE
    (tmp_path / "old").mkdir()
    config = tmp_path / "old" / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert template_of(config.parent) == "{{ x }}"
    (tmp_path / "a.jinja").write_text("{{ y }}")
    assert template_of(tmp_path / "a.jinja") == "{{ y }}"
    for missing in ("b.jinja", "."):
        with pytest.raises(DatasetError, match="no chat template can be read there"):
            template_of(tmp_path / missing)


def test_the_teacher_may_be_given_something_else(tmp_path: Path) -> None:
    hint = [{"role": "system", "content": "it is 2"}, *HI]
    prompts = loaded(
        tmp_path,
        {"messages": HI, "teacher_prompt": hint},
        {"prompt": "hi", "teacher_prompt": "the cat"},
        {"messages": HI, "teacher_prompt": HI},
        {"messages": HI},
    )
    assert [str(PLAIN.decode(prompt.teacher_prompt_ids.tolist())) for prompt in prompts] == [
        "<s><system>it is 2\n<user>hi\n<assistant>",
        "the cat",
        "<s><user>hi\n<assistant>",
        "<s><user>hi\n<assistant>",
    ]
    assert [prompt.teacher_token_ids is None for prompt in prompts] == [False, False, True, True]
    assert text_of(prompts[1]) == "hi"


def test_the_teacher_may_have_a_template_of_its_own(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    prompts = loaded(
        tmp_path,
        {"messages": HI},
        {"prompt": "hi"},
        {"prompt": "hi", "teacher_prompt": HI},
        teacher_chat_template=template,
    )
    assert [str(PLAIN.decode(prompt.teacher_prompt_ids.tolist())) for prompt in prompts] == [
        "u:hi;a:",
        "hi",
        "u:hi;a:",
    ]
    assert text_of(prompts[0]) == "<s><user>hi\n<assistant>"


def test_a_row_names_its_teacher(tmp_path: Path) -> None:
    prompts = loaded(
        tmp_path, {"prompt": "hi", "teacher": "code"}, {"prompt": "hi"}, teachers=("code", "maths")
    )
    assert [prompt.teacher for prompt in prompts] == ["code", None]
    reason = refused(tmp_path, {"prompt": "hi", "teacher": "law"}, teachers=("code", "maths"))
    assert reason == "teacher 'law' has no table [teachers.law]; there are: code, maths"


def test_the_rows_of_the_guide_are_taken(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", guide, re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    prompts = loaded(tmp_path, *rows, teachers=("code",))
    assert len(prompts) == 7
    assert prompts[0].answer == "42"
    assert prompts[2].text.endswith("</think>")
    assert prompts[3].teacher_token_ids is not None
    assert prompts[4].teacher == "code"
    assert [len(prompt.turns) for prompt in prompts] == [0] * 5 + [1, 1]


def test_rows_too_long_are_refused_or_left_out_with_a_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "hi"}] * 8 + [{"prompt": "the cat " * 9, "id": "long"}]
    reason = r"rows\.jsonl:9: the prompt has .* tokens, must be 1 to 10; data\.too_long = \"skip\""
    with pytest.raises(DatasetError, match=reason):
        loaded(tmp_path, *rows, most=10)
    skip = Limits(too_long="skip", max_skipped_share=0.2)
    assert len(loaded(tmp_path, *rows, most=10, limits=skip)) == 8
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert "1 of 9 rows are too long and were left out; the first: " in said.getMessage()
    with pytest.raises(DatasetError, match=r"1 of 9 .* more than data\.max_skipped_share, 0\.1"):
        loaded(tmp_path, *rows, most=10, limits=Limits(too_long="skip"))
    teachers = {"prompt": "hi", "teacher_prompt": "the cat " * 9}
    assert len(loaded(tmp_path, *rows[:8], teachers, most=10, limits=skip)) == 8


def test_prompts_that_do_not_come_back_from_their_ids_are_refused_above_a_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lossy = byte_level()
    lossy.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    rows = [{"prompt": "hi"}] * 3 + [{"prompt": "the cat"}]
    with pytest.raises(DatasetError, match=r"1 of 4 prompts do not come back .*'thecat'.*share"):
        loaded(tmp_path, *rows, tokenizer=lossy)
    limits = Limits(max_lossy_share=0.25)
    assert len(loaded(tmp_path, *rows, tokenizer=lossy, limits=limits)) == 4
    (said,) = caplog.records
    assert "1 of 4 prompts do not come back from their token ids" in said.getMessage()
