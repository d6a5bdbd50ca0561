"""One rollout, without vllm and grpc."""

from __future__ import annotations

import asyncio
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.records import Finish, Rollout, SamplingOptions
from student_trainer.rollouts.rollout import RolloutRules, run_rollout
from teacher_wire.errors import EngineError, NotReadyError
from teacher_wire.records import ScoreRows, TokenSpan
from tests.trainer.in_memory import (
    InMemorySampler,
    ScriptedSession,
    prompt,
    rules,
    teacher_rows,
    turns,
)
from tests.waiting import LIMIT_S

PROMPT = prompt(5, 9)


async def roll(
    sampler: InMemorySampler,
    session: ScriptedSession,
    *,
    max_tokens: int = 40,
    num_topk: int = 2,
    run_rules: RolloutRules | None = None,
) -> Rollout | None:
    """One rollout of PROMPT; hangs are failures."""
    options = SamplingOptions(max_tokens=max_tokens, num_topk=num_topk, seed=1)
    async with asyncio.timeout(LIMIT_S):
        return await run_rollout(
            PROMPT,
            request_id="r",
            options=options,
            sampler=sampler,
            session=session,
            rules=run_rules or rules(),
            policy_version=3,
        )


def rows_equal(left: ScoreRows, right: ScoreRows) -> bool:
    """True when every array of both is the same."""
    pairs = ((getattr(left, f.name), getattr(right, f.name)) for f in fields(ScoreRows))
    return all(
        a is b is None or (a is not None and b is not None and np.array_equal(a, b))
        for a, b in pairs
    )


async def test_rollout_holds_what_was_sampled_and_what_the_teacher_said() -> None:
    sampler, session = InMemorySampler(), ScriptedSession()
    rollout = await roll(sampler, session, max_tokens=10)
    assert rollout is not None
    ids, topk, logprobs = sampler.draw(
        PROMPT.token_ids, SamplingOptions(max_tokens=10, num_topk=2, seed=1)
    )
    assert np.array_equal(rollout.response_ids, ids)
    assert np.array_equal(rollout.behavior_logprobs, logprobs)
    assert np.array_equal(rollout.student_topk_ids, topk)
    assert np.array_equal(rollout.student_topk_logprobs, np.stack([logprobs] * 2, axis=1))
    whole = TokenSpan(offset=0, token_ids=ids, candidate_ids=topk)
    assert rows_equal(rollout.teacher, teacher_rows(whole))
    assert (rollout.finish, rollout.num_generated) == (Finish.LENGTH, 10)
    assert rollout.policy_version == 3
    assert rollout.drift is not None
    assert rollout.drift.num_tokens == 10
    assert session.num_closed == 1
    assert sampler.aborts == []


@settings(max_examples=60, deadline=None)
@given(
    max_tokens=st.integers(1, 40),
    tokens_per_delta=st.integers(1, 9),
    chunk_tokens=st.integers(1, 12),
    turns_per_append=st.integers(0, 30),
    stop_after=st.none() | st.integers(1, 40),
    truncate_at=st.none() | st.integers(1, 40),
    max_span_tokens=st.integers(12, 20),
    block_tokens=st.integers(1, 9),
)
def test_spans_cover_every_kept_token_exactly_once_whatever_the_timing(
    max_tokens: int,
    tokens_per_delta: int,
    chunk_tokens: int,
    turns_per_append: int,
    stop_after: int | None,
    truncate_at: int | None,
    max_span_tokens: int,
    block_tokens: int,
) -> None:
    sampler = InMemorySampler(tokens_per_delta=tokens_per_delta, stop_after=stop_after)
    session = ScriptedSession(turns_per_append=turns_per_append, truncate_at=truncate_at)
    run_rules = rules(
        chunk_tokens=chunk_tokens, max_span_tokens=max_span_tokens, block_tokens=block_tokens
    )
    rollout = asyncio.run(roll(sampler, session, max_tokens=max_tokens, run_rules=run_rules))
    assert rollout is not None

    ends = np.cumsum([len(span) for span in session.spans])
    assert [span.offset for span in session.spans] == [0, *ends[:-1]]
    assert max(len(span) for span in session.spans) <= max_span_tokens
    sent = np.concatenate([span.token_ids for span in session.spans])
    natural = min(max_tokens, stop_after or max_tokens)
    kept = min(natural, truncate_at or natural)
    assert len(rollout) == len(rollout.teacher) == len(rollout.mask) == kept
    assert np.array_equal(sent[:kept], rollout.response_ids)
    assert (rollout.finish is Finish.TRUNCATED) == (
        truncate_at is not None and truncate_at <= natural
    )
    assert len(sampler.aborts) <= 1


async def test_tokens_past_the_verdict_are_dropped_and_counted() -> None:
    sampler = InMemorySampler(abort_lag_tokens=5)
    session = ScriptedSession(truncate_at=6, turns_per_append=3)
    rollout = await roll(sampler, session)
    assert rollout is not None
    assert rollout.finish is Finish.TRUNCATED
    assert len(rollout) == 6
    assert rollout.num_generated == sampler.ended["r"] < 40
    assert rollout.overshoot_tokens == rollout.num_generated - 6 > 0
    assert len(rollout.behavior_logprobs) == len(rollout.student_topk_ids) == 6
    assert rollout.times.verdict_span_tokens == len(session.spans[-1])
    # What came while the deciding append was away, then what came until the abort was obeyed.
    sent = sum(len(span) for span in session.spans)
    assert rollout.num_generated >= sent + rollout.times.round_trip_tokens
    assert sampler.aborts == ["r"]


async def test_verdict_after_the_end_aborts_nothing() -> None:
    sampler, session = InMemorySampler(), ScriptedSession(truncate_at=3, turns_per_append=100)
    rollout = await roll(sampler, session, max_tokens=8)
    assert rollout is not None
    assert (len(rollout), rollout.num_generated) == (3, 8)
    assert rollout.finish is Finish.TRUNCATED
    assert sampler.aborts == []


async def test_slow_teacher_gets_larger_spans_and_not_a_queue() -> None:
    quick, slow = ScriptedSession(), ScriptedSession(turns_per_append=20)
    await roll(InMemorySampler(), quick)
    await roll(InMemorySampler(), slow)
    assert [len(span) for span in quick.spans] == [4] * 10
    assert len(slow.spans) <= 4
    assert max(len(span) for span in slow.spans[1:]) >= 15


async def test_span_is_never_longer_than_the_teacher_takes() -> None:
    session = ScriptedSession(turns_per_append=100)
    await roll(InMemorySampler(), session, run_rules=rules(max_span_tokens=7))
    assert [len(span) for span in session.spans] == [4, 7, 7, 7, 7, 7, 1]


async def test_appends_end_on_the_teachers_blocks_until_the_response_ends() -> None:
    session = ScriptedSession()
    await roll(InMemorySampler(), session, run_rules=rules(chunk_tokens=8, block_tokens=8))
    assert len(PROMPT.token_ids) == 2
    ends = np.cumsum([len(span) for span in session.spans])
    assert ends.tolist() == [6, 14, 22, 30, 38, 40]


async def test_blocks_larger_than_a_chunk_do_not_hold_tokens_back() -> None:
    session = ScriptedSession()
    await roll(InMemorySampler(), session, run_rules=rules(chunk_tokens=4, block_tokens=64))
    assert [len(span) for span in session.spans] == [4] * 10


async def test_nothing_is_generated_after_the_student_ended() -> None:
    sampler, session = InMemorySampler(stop_after=11, tokens_per_delta=3), ScriptedSession()
    rollout = await roll(sampler, session)
    assert rollout is not None
    assert (len(rollout), rollout.num_generated, rollout.finish) == (11, 11, Finish.STOP)
    assert sampler.aborts == []


async def test_teacher_error_ends_the_generation_and_is_raised() -> None:
    sampler = InMemorySampler()
    session = ScriptedSession(failures={1: EngineError("the engine died")})
    with pytest.raises(EngineError, match="the engine died"):
        await roll(sampler, session)
    assert sampler.aborts == ["r"]
    assert sampler.ended["r"] < 40
    assert sampler.running == {}
    assert session.num_closed == 1


class SilentSampler(InMemorySampler):
    """Hands out a first chunk and then nothing more until it is aborted."""

    async def generate(self, request_id, prompt_ids, options):  # type: ignore[no-untyped-def]
        async for delta in super().generate(request_id, prompt_ids, options):
            while self.running[request_id] > 4 and request_id not in self.aborts:
                await turns(1)
            yield delta


async def test_teacher_error_ends_a_generation_that_is_silent() -> None:
    sampler = SilentSampler()
    with pytest.raises(EngineError):
        await roll(sampler, ScriptedSession(failures={0: EngineError("gone")}))
    assert sampler.aborts == ["r"]


async def test_absent_teacher_is_an_error_unless_dropping_is_asked_for() -> None:
    sampler = InMemorySampler()
    with pytest.raises(NotReadyError):
        await roll(sampler, ScriptedSession(failures={0: NotReadyError("away")}))
    assert sampler.aborts == ["r"]


async def test_absent_teacher_keeps_what_it_had_scored_when_dropping() -> None:
    sampler = InMemorySampler()
    session = ScriptedSession(failures={2: NotReadyError("away")})
    rollout = await roll(sampler, session, run_rules=rules(finish_when_absent=True))
    assert rollout is not None
    assert (len(rollout), rollout.finish) == (8, Finish.UNSCORED)
    assert rollout.drift is not None
    assert rollout.drift.num_tokens == 8
    assert sampler.aborts == ["r"]
    assert rollout.num_generated == sampler.ended["r"] < 40


async def test_rollout_of_which_nothing_was_scored_is_none_when_dropping() -> None:
    session = ScriptedSession(failures={0: NotReadyError("away")})
    rollout = await roll(InMemorySampler(), session, run_rules=rules(finish_when_absent=True))
    assert rollout is None
    assert session.num_closed == 1


async def test_sampler_error_is_raised_and_the_session_closed() -> None:
    session = ScriptedSession(turns_per_append=50)
    with pytest.raises(ConnectionResetError):
        await roll(InMemorySampler(fail_seed=1), session)
    assert session.num_closed == 1


async def test_cancelled_rollout_ends_its_append_before_its_session() -> None:
    session, sampler = ScriptedSession(turns_per_append=10_000), InMemorySampler()
    task = asyncio.create_task(roll(sampler, session))
    await turns(10)
    assert session.num_under_way == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.num_closed == 1
    assert sampler.running == {}


async def test_masks_travel_with_the_spans_and_stay_with_the_rollout() -> None:
    sampler, session = InMemorySampler(), ScriptedSession()
    ids, _, _ = sampler.draw(PROMPT.token_ids, SamplingOptions(max_tokens=40, num_topk=2, seed=1))
    # A token that comes again in a later span: only its first occurrence is masked.
    special = next(int(token) for token in ids[:4] if token in ids[8:])
    rollout = await roll(sampler, session, run_rules=rules(specials=[special]))
    assert rollout is not None
    expected = np.ones(40, np.bool_)
    expected[int(np.flatnonzero(ids == special)[0])] = False
    assert np.count_nonzero(ids == special) > 1
    sent = np.concatenate([span.event_mask for span in session.spans])  # type: ignore[misc]
    assert np.array_equal(rollout.mask, expected)
    assert np.array_equal(sent, expected)


async def test_candidates_are_left_out_when_the_student_has_no_topk() -> None:
    session = ScriptedSession()
    rollout = await roll(InMemorySampler(), session, num_topk=0)
    assert all(span.candidate_ids is None for span in session.spans)
    assert rollout is not None
    assert rollout.teacher.candidate_logprobs is None
    assert rollout.student_topk_ids.shape == (40, 0)
