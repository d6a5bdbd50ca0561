"""Students and teachers whose widths or tokens differ: what takes no part, what is said, what is
refused. Real teachers on loopback, real updates.

Run: python -m pytest tests/trainer/test_shared_ids.py
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from student_trainer.assembly.checkpoint_eval import evaluate_checkpoint
from student_trainer.assembly.run import assembled
from student_trainer.assembly.teachers import Teachers, connected
from student_trainer.errors import ConfigError, DatasetError
from student_trainer.pretrained import load_tokenizer
from student_trainer.recording.json_lines import read_lines
from student_trainer.records import Prompt, Rollout
from student_trainer.rollouts.stream import LoopThread, RolloutStream, Taken
from student_trainer.settings.config import TrainerConfig
from student_trainer.train import train
from student_trainer.train_state import complete_checkpoints
from student_trainer.vocabulary import Entry, SharedIds, shared_ids
from teacher_client.client import TeacherClient
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.vocabulary import Vocabulary
from tests.client.client_sessions import client_of
from tests.teacher.engine.engine_models import byte_tokenizer
from tests.trainer.learner.tiny_student import tiny_student
from tests.trainer.test_conversations import TEMPLATE
from tests.trainer.test_teachers import configured, served

NAMES = ("<|a|>", "<|b|>", "<|c|>")
"""Behind <pad>, <eos> and 256 bytes: 261 tokens."""
PAD2 = 261
CLOSE = 1e-4
ROWS: list[dict[str, object]] = [{"prompt": f"{i}+{i}=", "answer": "7"} for i in range(4)]
TALKING = ("budget.max_tokens=30", "rollout.max_context=60")


def tokenizer_of(*more: str) -> PreTrainedTokenizerFast:
    """The 261 tokens, and more."""
    return byte_tokenizer(*NAMES, *more)


def write_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, width: int, *, seed: int, likely: int = 0
) -> torch.nn.Module:
    """A model of so many logits, with this tokenizer, that often says the id `likely`."""
    model = tiny_student(seed=seed, vocab_size=width)
    with torch.no_grad():
        model.lm_head.weight[likely] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def talks(folder: Path, *turns: str, **more: object) -> list[dict[str, object]]:
    """Rows of two answers, with these turns between them; writes their template."""
    (folder / "chat.jinja").write_text(TEMPLATE)
    return [
        {
            "messages": [{"role": "user", "content": str(i)}],
            "turns": [{"role": "user", "content": turn}],
            **more,
        }
        for i, turn in enumerate(turns)
    ]


def ends_soon() -> str:
    """So many stop tokens that an answer ends soon."""
    vocabulary = tokenizer_of().get_vocab()
    return f"rollout.stop_tokens={json.dumps([t for t, i in vocabulary.items() if 0 < i < 200])}"


def trained(config: TrainerConfig, monkeypatch: pytest.MonkeyPatch) -> list[Rollout]:
    """All that a run has learnt from."""
    take, rollouts = RolloutStream.take, []

    def record(stream: RolloutStream, count: int) -> Taken:
        taken = take(stream, count)
        rollouts.extend(taken.rollouts)
        return taken

    monkeypatch.setattr(RolloutStream, "take", record)
    with assembled(config) as run:
        train(run)
        run.finish()
    return rollouts


def check_rows(rollouts: list[Rollout], teacher: torch.nn.Module, excluded: list[int]) -> None:
    """The student says nothing of these, and the teacher's rows are those of a model without."""
    assert len(rollouts) == 8
    for rollout in rollouts:
        assert not np.isin(rollout.response_ids, excluded).any()
        assert not np.isin(rollout.student_topk_ids, excluded).any()
        assert not np.isin(rollout.teacher.topk_ids, excluded).any()
        prompt_ids = rollout.prompt.token_ids
        sequence = torch.from_numpy(np.concatenate([prompt_ids, rollout.response_ids])).long()
        with torch.no_grad():
            logits = teacher(sequence[None]).logits[0, len(prompt_ids) - 1 : -1]
        logits[:, [i for i in excluded if i < logits.shape[1]]] = -torch.inf
        logprobs = torch.log_softmax(logits, -1)
        own = logprobs[torch.arange(len(rollout)), torch.from_numpy(rollout.response_ids).long()]
        assert np.abs(rollout.teacher.token_logprobs - own.numpy()).max() < CLOSE
        assert np.abs(rollout.teacher.topk_logprobs - logprobs.topk(6).values.numpy()).max() < CLOSE
        at_own = logprobs.gather(1, torch.from_numpy(rollout.student_topk_ids).long()).numpy()
        assert rollout.teacher.candidate_logprobs is not None
        assert np.abs(rollout.teacher.candidate_logprobs - at_own).max() < CLOSE


@pytest.mark.parametrize(("student", "teacher"), [(384, 320), (320, 384)])
def test_ids_beyond_the_smaller_width_take_no_part(
    student: int,
    teacher: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = write_model(tmp_path / "student", tokenizer_of(), student, seed=0, likely=student - 1)
    model = write_model(tmp_path / "one", tokenizer_of(), teacher, seed=1, likely=teacher - 1)
    with served(tmp_path / "one", tokenizer=tokenizer_of()) as (address,):
        config = configured(
            tmp_path,
            tmp_path,
            ROWS,
            f'teacher.endpoints=["{address}"]',
            f"data.heldout={tmp_path / 'train.jsonl'}",
        )
        rollouts = trained(config, monkeypatch)
        said = " ".join(capsys.readouterr().out.split())
        evaluate_checkpoint(config, str(config.run.out / "student"), teacher="required")
        said_by_eval = " ".join(capsys.readouterr().err.split())
    check_rows(rollouts, model, list(range(320, 384)))
    widths = f"the student has {student} logits, the teacher {teacher}"
    for text in (said, said_by_eval):
        assert f"{widths}: the ids from 320 to 383 take no" in text
    records = list(read_lines(config.run.out / "metrics.jsonl"))
    assert [r["kind"] for r in records].count("step") == 2
    # The sampler's distribution is the learner's after every step.
    assert all(r["sync_gap_nats"] < CLOSE for r in records if r["kind"] == "step")
    evaluated = [r for r in records if r["kind"] == "eval"]
    assert evaluated
    assert all(np.isfinite(r["heldout_reverse_kl"]) for r in evaluated)
    saved = load_file(config.run.out / "student" / "model.safetensors")["lm_head.weight"]
    start = before.lm_head.weight
    assert saved.shape == start.shape == (student, 32)
    assert torch.equal(saved[320:], start[320:])
    assert not torch.equal(saved[:320], start[:320])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_one_unused_token_more_is_named_and_takes_no_part(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = {"student": tokenizer_of(), "teacher": tokenizer_of()}
    tokenizers[who] = tokenizer_of("[PAD2]")
    write_model(tmp_path / "student", tokenizers["student"], 320, seed=0, likely=PAD2)
    model = write_model(tmp_path / "one", tokenizers["teacher"], 320, seed=1, likely=PAD2)
    with served(tmp_path / "one", tokenizer=tokenizers["teacher"]) as (address,):
        config = configured(tmp_path, tmp_path, ROWS, f'teacher.endpoints=["{address}"]')
        rollouts = trained(config, monkeypatch)
    check_rows(rollouts, model, [PAD2])
    said = " ".join(capsys.readouterr().out.split())
    entry = "('[PAD2]' / nothing)" if who == "student" else "(nothing / '[PAD2]')"
    assert f"than to the student take no part (1; student / teacher): 261 {entry}" in said


def test_turns_stand_beside_a_low_id_that_takes_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first id there is: what stands in a turn for the student's candidates may not hold it."""
    renamed = tokenizer_of().backend_tokenizer.to_str().replace('"<pad>"', '"[PAD]"')
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(renamed), eos_token="<eos>", pad_token="[PAD]"
    )
    write_model(tmp_path / "student", tokenizer_of(), 320, seed=0)
    model = write_model(tmp_path / "one", theirs, 320, seed=1)
    with served(tmp_path / "one", tokenizer=theirs) as (address,):
        config = configured(
            tmp_path,
            tmp_path,
            talks(tmp_path, *["sure"] * 4),
            f'teacher.endpoints=["{address}"]',
            f"data.chat_template={tmp_path / 'chat.jinja'}",
            ends_soon(),
            *TALKING,
        )
        rollouts = trained(config, monkeypatch)
    assert sum(rollout.sampled is not None for rollout in rollouts) > 3
    check_rows(rollouts, model, [0])


def test_a_turn_may_hold_nothing_that_one_of_the_teachers_reads_otherwise(tmp_path: Path) -> None:
    """What one of them excludes takes no part at all, so no response may have it."""
    write_model(tmp_path / "student", tokenizer_of(), 320, seed=0)
    write_model(tmp_path / "one", tokenizer_of(), 320, seed=1)
    write_model(tmp_path / "two", tokenizer_of(), 320, seed=2)
    theirs = byte_tokenizer("<|a|>", "<|b|>", "<|tool|>")
    with (
        served(tmp_path / "one", tokenizer=theirs) as (one,),
        served(tmp_path / "two", tokenizer=tokenizer_of()) as (two,),
    ):
        rows = [*talks(tmp_path, "sure"), *talks(tmp_path, "no", "x<|c|>y", teacher="two")]
        config = configured(
            tmp_path,
            tmp_path,
            rows,
            f'teacher.endpoints=["{one}"]',
            f'teachers.two.endpoints=["{two}"]',
            "teachers.two.k=6",
            f"data.chat_template={tmp_path / 'chat.jinja'}",
            *TALKING,
        )
        reason = (
            r"^\[teacher\]: .*train\.jsonl:3: turns\[0\] has the id 260, which is '<\|c\|>' to the "
            r"student and '<\|tool\|>' to the teacher: write it without"
        )
        with pytest.raises(DatasetError, match=reason), assembled(config):
            pass


@asynccontextmanager
async def teacher_of(
    tokenizer: PreTrainedTokenizerFast | None, width: int = 320
) -> AsyncIterator[TeacherClient]:
    """A client of a teacher with this tokenizer."""
    engine, vocabulary = FakeEngine(vocab_size=width), Vocabulary()
    info = teacher_info(engine)
    if tokenizer is not None:
        vocabulary = Vocabulary.of(tokenizer)
        info = replace(
            info,
            tokenizer_fingerprint=vocabulary.fingerprint,
            token_digests=vocabulary.digests,
        )
    async with (
        local_teacher(engine, info=info, vocabulary=vocabulary) as teacher,
        client_of(teacher.address, vocab_size=0) as client,
    ):
        yield client


async def compared(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast | None, width: int = 320
) -> SharedIds:
    async with teacher_of(teacher) as client:
        return await shared_ids(Vocabulary.of(student), width, client)


async def test_what_makes_ids_of_a_text_is_not_compared() -> None:
    """The normaliser, the pre-tokenizer, and which tokens are special."""
    teacher = tokenizer_of()
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    teacher.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    teacher.add_special_tokens({"additional_special_tokens": ["a", "b"]})
    shared = await compared(tokenizer_of(), teacher)
    assert shared == SharedIds(student_width=320, teacher_width=320)
    assert (shared.excluded_ids, shared.warnings([1])) == ((), [])


async def test_renamed_tokens_are_named_up_to_one_in_a_hundred() -> None:
    """2 of 261 ids are below it, 3 above."""
    two = await compared(tokenizer_of(), byte_tokenizer("<|a|>", "<|tool|>", "<|call|>"))
    assert two.differing == (
        Entry(token_id=259, student="<|b|>", teacher="<|tool|>"),
        Entry(token_id=260, student="<|c|>", teacher="<|call|>"),
    )
    assert two.excluded_ids == ((259, 261),)
    (said,) = two.warnings([1])
    assert said.endswith("259 ('<|b|>' / '<|tool|>'), 260 ('<|c|>' / '<|call|>')")
    three = byte_tokenizer("<|x|>", "<|tool|>", "<|call|>")
    with pytest.raises(FingerprintMismatchError, match="of 261 ids 3 mean something else"):
        await compared(tokenizer_of(), three)


async def test_another_tokenizer_is_refused_with_entries_counts_and_a_remedy() -> None:
    more = [f"<more {i}>" for i in range(20)]
    with pytest.raises(FingerprintMismatchError) as caught:
        await compared(tokenizer_of(*more), tokenizer_of())
    said = str(caught.value)
    assert "the student and the teacher fake-320 have different tokenizers" in said
    assert "of 281 ids 20 mean something else, more than 1%" in said
    assert "such as 261 ('<more 0>' / nothing), 262" in said
    assert "270 ('<more 9>' / nothing) and 10 more" in said
    assert "the student has 281 tokens, the teacher 261" in said
    assert "Take a teacher with the student's tokenizer" in said


async def test_a_teacher_that_does_not_tell_its_tokens_is_refused() -> None:
    with pytest.raises(FingerprintMismatchError, match="does not tell its tokens"):
        await compared(tokenizer_of(), None)


def prompt_of(
    *token_ids: int, teacher: list[int] | None = None, turns: Sequence[Sequence[int]] = ()
) -> Prompt:
    """With these ids, and others for the teacher."""
    return Prompt(
        prompt_id="train.jsonl:3",
        text="",
        token_ids=np.array(token_ids, np.int32),
        answer=None,
        teacher_token_ids=None if teacher is None else np.array(teacher, np.int32),
        turns=tuple(np.array(turn, np.int32) for turn in turns),
    )


SHARED = SharedIds(
    student_width=384,
    teacher_width=320,
    differing=(
        Entry(token_id=260, student="<|c|>", teacher="<|call|>"),
        Entry(token_id=330, student="<|far|>", teacher=None),
    ),
)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (prompt_of(5, 260, 6), "the id 260, which is '<|c|>' to the student and '<|call|>' to the"),
        (prompt_of(5, 6, teacher=[7, 330]), "the id 330, which is '<|far|>' .* and nothing to the"),
        (prompt_of(5, 383), "the id 383, and the teacher's model has 320 ids"),
        (prompt_of(5, 400, teacher=[5]), "the id 400, and the student's model has 384 ids"),
    ],
)
def test_a_prompt_that_a_side_reads_otherwise_is_refused(prompt: Prompt, text: str) -> None:
    with pytest.raises(DatasetError, match=rf"^train\.jsonl:3: the prompt has {text}"):
        SHARED.refuse_prompts([prompt_of(1, 2), prompt])


def test_a_prompt_that_the_teacher_does_not_see_may_have_them() -> None:
    SHARED.refuse_prompts([prompt_of(5, 260, 330, 383, teacher=[5, 319]), prompt_of(1, 319)])


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        ([1, 260], "the id 260, which is '<|c|>' to the student and '<|call|>' to the teacher"),
        ([330, 1], "the id 330, which is '<|far|>' to the student and nothing to the teacher"),
        ([320], "the id 320, and the teacher's model has 320 ids"),
        ([384], "the id 384, and the student's model has 384 ids"),
    ],
)
def test_a_turn_that_the_teacher_reads_otherwise_is_refused(turn: list[int], text: str) -> None:
    """Whatever the prompt is to the teacher: a turn is given to both as it is."""
    SHARED.refuse_turns([prompt_of(5, turns=[[1, 319]])])
    with pytest.raises(DatasetError) as caught:
        SHARED.refuse_turns([prompt_of(1), prompt_of(5, teacher=[6], turns=[[1, 319], turn])])
    assert str(caught.value).startswith(f"train.jsonl:3: turns[1] has {text}")


@pytest.mark.parametrize("teacher_width", [259, 320])
def test_a_turn_beyond_the_students_model_is_refused(teacher_width: int) -> None:
    shared = SharedIds(student_width=259, teacher_width=teacher_width)
    with pytest.raises(DatasetError, match=r"turns\[0\] has the id 260, and the student's"):
        shared.refuse_turns([prompt_of(5, turns=[[260]])])


def test_end_tokens_that_take_no_part_are_named() -> None:
    assert SHARED.excluded_ids == ((260, 261), (320, 384))
    assert len(SHARED.warnings([1, 319])) == 2
    *_, said = SHARED.warnings([1, 260, 350])
    assert "end tokens among the ids that take no part" in said
    assert "260, 350; name another in rollout.stop_tokens" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.k=6"], r"^teacher\.k is 6, and 5 of the 320 ids of the teacher .* at most 5$"),
        (
            ["teacher.k=5", "rollout.student_topk=6"],
            r"^rollout\.student_topk is 6, and 5 of the 320 ids",
        ),
    ],
)
def test_more_entries_than_ids_take_part_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    """Of a student of 5 logits; a tokenizer has more tokens than its models have rows for."""
    write_model(tmp_path / "student", tokenizer_of(), 5, seed=0)
    write_model(tmp_path / "one", tokenizer_of(), 320, seed=1)
    with served(tmp_path / "one", tokenizer=tokenizer_of()) as (address,):
        config = configured(
            tmp_path, tmp_path, ROWS, f'teacher.endpoints=["{address}"]', *overrides
        )
        with (
            pytest.raises(ConfigError, match=message),
            closing(LoopThread()) as loop,
            connected(config, loop, [prompt_of(1, 2)], 5, load_tokenizer(str(tmp_path / "one"))),
        ):
            pass


def test_a_checkpoint_is_evaluated_by_the_distribution_of_its_run(tmp_path: Path) -> None:
    """The held-out problems name one of two teachers, and the other has fewer ids."""
    write_model(tmp_path / "student", tokenizer_of(), 384, seed=0, likely=383)
    write_model(tmp_path / "one", tokenizer_of(), 384, seed=1)
    write_model(tmp_path / "two", tokenizer_of(), 320, seed=2)
    heldout, shared = tmp_path / "heldout.jsonl", [[320, 384]]
    heldout.write_text("\n".join(map(json.dumps, ROWS)))
    with served(tmp_path / "one", tmp_path / "two", tokenizer=tokenizer_of()) as (one, two):
        config = configured(
            tmp_path,
            tmp_path,
            [*ROWS[:2], *({**row, "teacher": "two"} for row in ROWS[2:])],
            f'teacher.endpoints=["{one}"]',
            f'teachers.two.endpoints=["{two}"]',
            "teachers.two.k=6",
            f"data.heldout={heldout}",
            "optim.learning_rate=1e-9",
            "checkpoint.every_steps=1",
        )
        before = evaluate_checkpoint(config, config.student.model, teacher="required")
        with assembled(config) as run:
            train(run)
            run.finish()
        records = [r for r in read_lines(config.run.out / "metrics.jsonl") if r["kind"] == "eval"]
        out = config.run.out
        checkpoints = [
            config.student.model,
            out / "student",
            *complete_checkpoints(out / "checkpoints"),
        ]
        results = [evaluate_checkpoint(config, str(c), teacher="required") for c in checkpoints]
        alone = evaluate_checkpoint(config, str(out / "student"), teacher="none")
    assert (before["run"], before["excluded_ids"]) == (None, [])
    expected = records[0]["heldout_reverse_kl"]
    assert before["heldout_reverse_kl"] != pytest.approx(expected, rel=0.01)
    assert len(results) == 4
    for result in (*results, alone):
        assert (result["run"], result["excluded_ids"]) == (str(out), shared)
    for result in results:
        assert result["heldout_reverse_kl"] == pytest.approx(expected, rel=1e-3)


def test_what_one_teacher_does_not_share_takes_no_part_at_all() -> None:
    wider = SharedIds(student_width=384, teacher_width=400)
    asked = Teachers(shared={None: SHARED, "wider": wider})
    assert asked.excluded_ids == ((260, 261), (320, 400))
    assert Teachers().excluded_ids == ()
