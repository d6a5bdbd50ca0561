"""The client on a healthy server. Run: pytest tests/client/test_teacher_client.py"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest

from teacher_client.retry import RetryLimits, backoff_s
from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.errors import (
    DeadlineError,
    EngineError,
    FingerprintMismatchError,
    InvalidRequestError,
    NotReadyError,
    SessionOffsetError,
)
from teacher_wire.records import ScoreOptions, TokenSpan
from tests.client.client_sessions import (
    OPTIONS,
    POLICY,
    PROMPT,
    append_all,
    client_of,
    make_span,
    reference,
)
from tests.teacher.scoring.fake_rows import assert_same_response, cut


async def test_a_session_equals_one_score_call() -> None:
    span = make_span(95)
    async with local_teacher() as teacher, client_of(teacher.address) as client:
        assert client.info == teacher.info
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = await append_all(session, span)
        whole = await client.score(PROMPT, span, OPTIONS, POLICY)
        assert_same_response(parts, whole)
        assert_same_response(parts, await reference(span))
        assert len(teacher.sessions) == 1
        await session.close()
        assert len(teacher.sessions) == 0


async def test_hundreds_of_sessions_share_one_stream() -> None:
    spans = [make_span(40, seed=seed) for seed in range(200)]
    engine = FakeEngine(base_latency_s=0.002)
    info = teacher_info(engine, max_sessions=300)
    async with local_teacher(engine, info=info) as teacher, client_of(teacher.address) as client:
        sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in spans]
        answers = await asyncio.gather(
            *(append_all(session, span) for session, span in zip(sessions, spans, strict=True))
        )
        assert len(teacher.service._streams) == 1
        for span, parts in list(zip(spans, answers, strict=True))[::40]:
            assert_same_response(parts, await reference(span))
        await asyncio.gather(*(session.close() for session in sessions))
        assert len(teacher.sessions) == 0


async def test_large_answers_are_joined_and_paid_with_credit() -> None:
    engine = FakeEngine(max_context=9000)
    span = make_span(4000)
    options = ScoreOptions(k=128)
    async with local_teacher(engine) as teacher:
        async with client_of(teacher.address, credit_bytes=1 << 20) as client:
            session = client.open(PROMPT, options, POLICY)
            parts = [await session.append(cut(span, 0, 2000))]
            parts.append(await session.append(cut(span, 2000, 4000)))
        whole = await teacher.sessions.score_once(PROMPT, span, options, POLICY, tenant="t")
        assert_same_response(parts, whole)


async def test_a_wrong_tokenizer_is_refused_at_connect() -> None:
    async with local_teacher() as teacher:
        with pytest.raises(FingerprintMismatchError, match="fingerprint is mine, the teacher's is"):
            async with client_of(teacher.address, tokenizer_fingerprint="mine"):
                pass


async def test_mistakes_of_the_caller_are_not_retried() -> None:
    async with local_teacher() as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        with pytest.raises(SessionOffsetError, match="append at 3"):
            await session.append(replace(make_span(5), offset=3))
        with pytest.raises(InvalidRequestError, match="k is 4096"):
            await client.open(PROMPT, ScoreOptions(k=4096), None).append(make_span(5))
        with pytest.raises(InvalidRequestError, match="k is 4096"):
            await client.score(PROMPT, make_span(5), ScoreOptions(k=4096), None)
        wide = TokenSpan(
            offset=0,
            token_ids=np.zeros(4096, np.int32),
            candidate_ids=np.zeros((4096, 1100), np.int32),
        )
        with pytest.raises(InvalidRequestError, match="bytes, the limit is"):
            await session.append(wide)
        await session.append(make_span(5))


async def test_an_append_that_fails_leaves_the_session_as_it_was_even_when_it_rewinds() -> None:
    engine, span = FakeEngine(), make_span(30)
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = await append_all(session, cut(span, 0, 20))
        before = session.drift
        engine.inject(Fault.RAISE)
        with pytest.raises(EngineError):
            await session.append(cut(span, 5, 8))
        assert (session.num_scored, session.drift) == (20, before)
        parts += await append_all(session, span)
        assert_same_response(parts, await reference(span))


async def test_a_deadline_reaches_the_server() -> None:
    engine = FakeEngine()
    limits = SchedulerLimits(max_running=1)
    async with local_teacher(engine, scheduler_limits=limits) as teacher:
        async with client_of(teacher.address) as client:
            engine.inject(Fault.HANG)
            stuck = asyncio.create_task(client.open(PROMPT, OPTIONS, None).append(make_span(5)))
            while not engine.num_queries:
                await asyncio.sleep(0.01)
            with pytest.raises(DeadlineError, match=r"of 0\.0[0-5][0-9] s|had passed by"):
                await client.open(PROMPT, OPTIONS, None).append(make_span(5), deadline_s=0.05)
            stuck.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stuck


async def test_a_closed_client_ends_its_sessions_and_refuses_work() -> None:
    async with local_teacher() as teacher:
        async with client_of(teacher.address) as client:
            session = client.open(PROMPT, OPTIONS, POLICY)
            await session.append(make_span(5))
            await client.aclose()
            assert len(teacher.sessions) == 0
            with pytest.raises(NotReadyError, match="closed"):
                await session.append(replace(make_span(5), offset=5))


def test_back_off_doubles_with_jitter_up_to_its_cap() -> None:
    limits = RetryLimits(first_backoff_s=0.1, max_backoff_s=1.0)
    for attempt, full in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0]):
        pauses = {backoff_s(limits, attempt) for _ in range(50)}
        assert full / 4 <= min(pauses) < max(pauses) <= full
    assert backoff_s(limits, 10_000) <= 1.0


@pytest.mark.parametrize("outage_s", [3, 5, 10, 30])
def test_clients_that_lost_a_server_together_come_back_one_by_one(outage_s: float) -> None:
    limits, num_clients, window_s = RetryLimits(), 4000, 0.2
    random.seed(outage_s)
    late = []
    for _ in range(num_clients):
        at, attempt = 0.0, 0
        while at < outage_s:
            at += backoff_s(limits, attempt)
            attempt += 1
        late.append(at - outage_s)
    assert max(late) <= limits.max_backoff_s
    times = np.sort(late)
    in_window = np.searchsorted(times, times + window_s) - np.arange(num_clients)
    even = num_clients * window_s / limits.max_backoff_s
    assert in_window.max() < 2 * even


@pytest.mark.parametrize(
    ("endpoints", "reason"),
    [([], "endpoints is empty"), (["a:1", "b:1", "a:1"], "endpoints names one twice: a:1, b:1")],
)
async def test_endpoints_that_make_no_sense_are_a_mistake(
    endpoints: list[str], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        async with client_of(*endpoints):
            pass
