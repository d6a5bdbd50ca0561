"""Several answers with turns of others between them: they are the teacher's to read and nobody's to
score.

Run: pytest tests/trainer/rollouts/test_generation.py
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.diagnostics.step import rollout_report, step_profile
from student_trainer.records import Finish, Prompt, Rollout, SamplingOptions
from student_trainer.rollouts.generation import GrowingResponse
from student_trainer.rollouts.rollout import run_rollout
from student_trainer.special_tokens import SpecialTokens
from tests.trainer.in_memory import EOS_ID, InMemorySampler, ScriptedSession, prompt, rules
from tests.waiting import LIMIT_S

SPECIAL_ID = 7
TURNS = tuple(
    np.array(ids, np.int32)
    # The first begins with what ends an answer, the second does not.
    for ids in ([EOS_ID, 30, 31, SPECIAL_ID], [40, 41])
)
SAID = ([30, 31, SPECIAL_ID], [40, 41])
"""What of the turns comes behind an answer that the student has ended."""


async def roll(
    sampler: InMemorySampler,
    session: ScriptedSession,
    *,
    asked: Prompt,
    max_tokens: int = 40,
    chunk_tokens: int = 4,
) -> Rollout:
    options = SamplingOptions(max_tokens=max_tokens, num_topk=2, seed=1)
    async with asyncio.timeout(LIMIT_S):
        rollout = await run_rollout(
            asked,
            request_id="r",
            options=options,
            sampler=sampler,
            session=session,
            rules=rules(chunk_tokens=chunk_tokens, specials=[SPECIAL_ID]),
            policy_version=0,
        )
    assert rollout is not None
    return rollout


def asked(*turns: np.ndarray) -> Prompt:
    return replace(prompt(5, 9), turns=turns)


async def test_every_answer_follows_all_that_was_said_before_it() -> None:
    sampler, session = InMemorySampler(stop_after=3), ScriptedSession()
    rollout = await roll(sampler, session, asked=asked(*TURNS))
    ids, sampled, logprobs = [], [], []
    for number in range(3):
        before = np.array([5, 9, *ids], np.int32)
        options = SamplingOptions(max_tokens=40 - len(ids), num_topk=2, seed=1 + number)
        answer, _, given = sampler.draw(before, options)
        turn = [*SAID, []][number]
        ids += [*answer.tolist(), *turn]
        sampled += [True] * len(answer) + [False] * len(turn)
        logprobs += [*given.tolist(), *[0.0] * len(turn)]
    assert rollout.response_ids.tolist() == ids
    assert rollout.sampled is not None
    assert rollout.sampled.tolist() == sampled
    np.testing.assert_array_equal(rollout.behavior_logprobs, np.float32(logprobs))
    assert rollout.finish is Finish.STOP
    assert rollout.num_generated == rollout.num_sampled == 9
    assert rollout.last_answer_ids.tolist() == ids[-3:]
    assert not rollout.mask[~rollout.sampled].any()


async def test_a_row_without_turns_is_what_it_was_to_the_bit() -> None:
    rollout = await roll(InMemorySampler(stop_after=9), ScriptedSession(), asked=asked())
    ids, topk, logprobs = InMemorySampler(stop_after=9).draw(
        np.array([5, 9], np.int32), SamplingOptions(max_tokens=40, num_topk=2, seed=1)
    )
    assert rollout.sampled is None
    assert np.array_equal(rollout.response_ids, ids)
    assert np.array_equal(rollout.student_topk_ids, topk)
    assert np.array_equal(rollout.behavior_logprobs, logprobs)
    assert np.array_equal(rollout.mask, SpecialTokens([SPECIAL_ID], first_only=True).mask(ids))


@settings(max_examples=60, deadline=None)
@given(
    max_tokens=st.integers(1, 30),
    tokens_per_delta=st.integers(1, 5),
    chunk_tokens=st.integers(1, 12),
    turns_per_append=st.integers(0, 20),
    stop_after=st.integers(1, 12),
    truncate_at=st.none() | st.integers(1, 30),
    lag=st.integers(0, 4),
)
def test_whatever_the_timing_the_teacher_reads_all_and_counts_what_was_sampled(
    max_tokens: int,
    tokens_per_delta: int,
    chunk_tokens: int,
    turns_per_append: int,
    stop_after: int,
    truncate_at: int | None,
    lag: int,
) -> None:
    sampler = InMemorySampler(
        tokens_per_delta=tokens_per_delta, stop_after=stop_after, abort_lag_tokens=lag
    )
    session = ScriptedSession(turns_per_append=turns_per_append, truncate_at=truncate_at)
    rollout = asyncio.run(
        roll(
            sampler,
            session,
            asked=asked(*TURNS),
            max_tokens=max_tokens,
            chunk_tokens=chunk_tokens,
        )
    )
    sent = np.concatenate([span.token_ids for span in session.spans])
    events = np.concatenate([span.event_mask for span in session.spans])
    kept = len(rollout)
    assert kept <= len(sent) <= max_tokens
    assert np.array_equal(sent[:kept], rollout.response_ids)
    assert np.array_equal(events[:kept], rollout.mask)
    sampled = np.ones(kept, np.bool_) if rollout.sampled is None else rollout.sampled
    assert rollout.num_sampled == sampled.sum() <= rollout.num_generated
    assert rollout.num_generated == sum(sampler.ended.values())
    assert not rollout.mask[~sampled].any()
    assert len(rollout.of_student(rollout.behavior_logprobs)) == rollout.num_sampled
    if truncate_at is not None and truncate_at <= len(sent):
        assert rollout.finish is Finish.TRUNCATED
        assert kept == truncate_at
    elif rollout.finish is Finish.STOP:
        assert kept == 3 * stop_after + 5
    else:
        assert rollout.finish is Finish.LENGTH
        assert 3 * stop_after + 5 > max_tokens


async def test_a_turn_that_leaves_no_room_for_an_answer_ends_the_rollout() -> None:
    for max_tokens, answers in ((6, 1), (7, 2), (8, 2)):
        sampler = InMemorySampler(stop_after=3)
        rollout = await roll(sampler, ScriptedSession(), asked=asked(*TURNS), max_tokens=max_tokens)
        assert len(sampler.seeds) == answers
        assert rollout.finish is Finish.LENGTH
        assert len(rollout) == (3 if answers == 1 else max_tokens)


async def test_a_verdict_stops_all_that_is_still_to_be_said() -> None:
    """It comes while the second answer is generated, or between two; there is no third."""
    for pause in range(12):
        sampler = InMemorySampler(stop_after=3)
        session = ScriptedSession(truncate_at=2, turns_per_append=pause)
        rollout = await roll(sampler, session, asked=asked(*TURNS), chunk_tokens=1)
        assert rollout.finish is Finish.TRUNCATED
        assert len(rollout) == 2
        assert rollout.sampled is None
        assert rollout.num_generated == sum(sampler.ended.values())
        if pause == 0:
            assert list(sampler.ended) == ["r"]


def test_an_answer_that_ended_otherwise_is_closed_by_the_turn() -> None:
    """At a stop token of the run, say: then what ends an answer is the turn's first token."""

    class EndsAtNine(InMemorySampler):
        async def generate(self, request_id, prompt_ids, options):  # type: ignore[no-untyped-def]
            async for delta in super().generate(request_id, prompt_ids, options):
                ids = np.where(delta.token_ids == EOS_ID, 9, delta.token_ids).astype(np.int32)
                yield replace(delta, token_ids=ids)

    sampler = EndsAtNine(stop_after=3)
    rollout = asyncio.run(roll(sampler, ScriptedSession(), asked=asked(TURNS[0])))
    assert rollout.response_ids[3:7].tolist() == TURNS[0].tolist()


async def test_figures_are_of_the_students_tokens() -> None:
    """The same answers with turns of any length between them have the same figures."""
    both = []
    for turns in ((), TURNS):
        sampler = InMemorySampler(stop_after=3)
        parts = await roll(sampler, ScriptedSession(), asked=asked(*turns))
        both.append(parts)
    plain, talk = both
    cut = replace(
        talk,
        response_ids=talk.of_student(talk.response_ids),
        behavior_logprobs=talk.of_student(talk.behavior_logprobs),
        mask=talk.of_student(talk.mask),
        sampled=None,
        teacher=replace(
            talk.teacher,
            **{
                name: talk.of_student(getattr(talk.teacher, name))
                for name in (
                    "topk_ids",
                    "topk_logprobs",
                    "token_logprobs",
                    "candidate_logprobs",
                    "overlap_counts",
                    "bad_events",
                )
            },
        ),
    )
    found, expected = (rollout_report([r], overlap_k=3) for r in (talk, cut))
    for name in ("kept_tokens", "generated_tokens", "length_mean", "overlap", "bad_event_rate"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.repetition_rate == expected.repetition_rate
    assert found.behavior_entropy == expected.behavior_entropy
    assert step_profile([talk], overlap_k=3) == step_profile([cut], overlap_k=3)
    assert rollout_report([plain], overlap_k=3).kept_tokens == 3


def test_a_special_token_that_others_said_is_not_the_students_first() -> None:
    growing = GrowingResponse(SamplingOptions(max_tokens=8), num_prompt=0)
    growing.extend_by_turn(np.array([SPECIAL_ID, 3], np.int32))
    assert growing.num_sampled == 0
    growing.token_ids[2:4] = SPECIAL_ID
    growing.num_tokens = 4
    counted = growing.counted(SpecialTokens([SPECIAL_ID], first_only=True), 4)
    assert counted.tolist() == [False, False, False, True]
