"""The client loses, repeats and changes no row, whatever the server and the network do.

Run: pytest tests/trainer/test_teacher_client.py
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from student_trainer.patience import RetryLimits, backoff_s
from student_trainer.teacher_client import TeacherClient, TeacherSession
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.scheduler import SchedulerLimits
from teacher_server.testing import LocalTeacher, local_teacher, teacher_info
from teacher_wire.codec import concat_rows
from teacher_wire.errors import (
    CapacityError,
    DeadlineError,
    EngineError,
    FingerprintMismatchError,
    InvalidRequestError,
    NonFiniteError,
    NotReadyError,
    SessionOffsetError,
)
from teacher_wire.records import DriftPolicy, ScoreOptions, ScoreRows, Scores, TokenSpan

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(k=8, w_drop=0.05)
FAST = RetryLimits(first_backoff_s=0.01, max_backoff_s=0.1)


def make_span(num_tokens: int, *, seed: int = 0) -> TokenSpan:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(512)[:16] for _ in range(num_tokens)]
    return TokenSpan(
        offset=0,
        token_ids=rng.integers(0, 512, num_tokens, dtype=np.int32),
        candidate_ids=np.array(rows, np.int32),
    )


def cut(span: TokenSpan, start: int, stop: int) -> TokenSpan:
    assert span.candidate_ids is not None
    return TokenSpan(
        offset=start,
        token_ids=span.token_ids[start:stop],
        candidate_ids=span.candidate_ids[start:stop],
    )


def assert_same_response(parts: list[Scores], whole: Scores) -> None:
    rows = concat_rows([part.rows for part in parts])
    for entry in fields(ScoreRows):
        np.testing.assert_array_equal(
            getattr(rows, entry.name), getattr(whole.rows, entry.name), err_msg=entry.name
        )
    last = parts[-1]
    assert (last.drift, last.verdict, last.keep_tokens) == (
        whole.drift,
        whole.verdict,
        whole.keep_tokens,
    )


async def reference(span: TokenSpan, policy: DriftPolicy = POLICY) -> Scores:
    async with local_teacher() as teacher:
        return await teacher.sessions.score_once(PROMPT, span, OPTIONS, policy, tenant="t")


@asynccontextmanager
async def client_of(*addresses: str, **changes: Any) -> AsyncIterator[TeacherClient]:
    arguments: dict[str, Any] = {
        "tokenizer_fingerprint": "",
        "vocab_size": 512,
        "run_id": "test",
        "connect_timeout_s": 10.0,
        "limits": FAST,
    }
    client = await TeacherClient.connect(list(addresses), **(arguments | changes))
    try:
        yield client
    finally:
        await client.aclose()


async def append_all(session: TeacherSession, span: TokenSpan, step: int = 10) -> list[Scores]:
    return [
        await session.append(cut(span, start, min(start + step, len(span))))
        for start in range(session.num_scored, len(span), step)
    ]


class Restarting:
    """A teacher that can be taken away and brought back at the same address."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.teacher: LocalTeacher
        self._stack = AsyncExitStack()
        self.port = 0

    async def start(self, **changes: Any) -> None:
        self.teacher = await self._stack.enter_async_context(
            local_teacher(self.engine, port=self.port, **changes)
        )
        self.port = int(self.teacher.address.rsplit(":", 1)[1])

    async def stop(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def restarting() -> AsyncIterator[Restarting]:
    server = Restarting()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


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


async def test_a_restarted_server_changes_nothing() -> None:
    span = make_span(120)
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = await append_all(session, cut(span, 0, 50))
        await server.stop()
        waiting = asyncio.create_task(append_all(session, cut(span, 0, 90)))
        await asyncio.sleep(0.1)
        await server.start()
        parts += await asyncio.wait_for(waiting, 10)
        await server.stop()
        await server.start()
        parts += await append_all(session, span)
        assert_same_response(parts, await reference(span))


async def test_an_answer_lost_on_the_way_is_asked_for_again() -> None:
    span = make_span(60)
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = [await session.append(cut(span, 0, 20))]
        server.engine.inject(Fault.HANG)
        waiting = asyncio.create_task(session.append(cut(span, 20, 60)))
        while server.engine.num_queries < 2:
            await asyncio.sleep(0.01)
        await server.stop()
        await server.start()
        parts.append(await asyncio.wait_for(waiting, 10))
        assert_same_response(parts, await reference(span))


async def test_many_sessions_survive_a_restart_in_mid_flight() -> None:
    spans = [make_span(60, seed=seed) for seed in range(40)]
    async with restarting() as server, client_of(server.teacher.address) as client:
        server.engine._base_latency_s = 0.005
        sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in spans]
        work = [
            asyncio.create_task(append_all(session, span, 5))
            for session, span in zip(sessions, spans, strict=True)
        ]
        for _ in range(3):
            await asyncio.sleep(0.05)
            await server.stop()
            await server.start()
        answers = await asyncio.wait_for(asyncio.gather(*work), 30)
        for span, parts in list(zip(spans, answers, strict=True))[::8]:
            assert_same_response(parts, await reference(span))


async def test_an_evicted_session_is_opened_again_in_silence() -> None:
    spans = [make_span(60, seed=seed) for seed in range(4)]
    engine = FakeEngine()
    info = teacher_info(engine, max_sessions=2)
    async with local_teacher(engine, info=info) as teacher, client_of(teacher.address) as client:
        sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in spans]
        answers: list[list[Scores]] = [[] for _ in spans]
        for start in range(0, 60, 20):
            for session, span, parts in zip(sessions, spans, answers, strict=True):
                parts.append(await session.append(cut(span, start, start + 20)))
        for span, parts in zip(spans, answers, strict=True):
            assert_same_response(parts, await reference(span))


@pytest.mark.parametrize("break_between", [False, True])
async def test_rewinding_equals_fresh_even_after_a_restart(break_between: bool) -> None:
    policy = replace(POLICY, threshold=1.0)
    old, new = make_span(60, seed=1), make_span(60, seed=2)
    assert old.candidate_ids is not None
    assert new.candidate_ids is not None
    joined = TokenSpan(
        offset=0,
        token_ids=np.concatenate([old.token_ids[:15], new.token_ids[15:]]),
        candidate_ids=np.concatenate([old.candidate_ids[:15], new.candidate_ids[15:]]),
    )
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, policy)
        await session.append(cut(old, 0, 30))
        if break_between:
            await server.stop()
            await server.start()
        await session.append(cut(old, 30, 60))
        scores = await session.append(cut(new, 15, 60))
        whole = await reference(joined, policy)
        assert (scores.drift, scores.keep_tokens) == (whole.drift, whole.keep_tokens)
        np.testing.assert_array_equal(scores.rows.topk_ids, whole.rows.topk_ids[15:])
        assert session.num_scored == 60


async def test_going_away_moves_sessions_to_another_server() -> None:
    span = make_span(60)
    async with local_teacher() as first, local_teacher() as second:
        async with client_of(first.address, second.address) as client:
            session = client.open(PROMPT, OPTIONS, POLICY)
            parts = [await session.append(cut(span, 0, 30))]
            assert await first.service.drain("test", 5.0)
            await first.server.stop(None)
            parts.append(await session.append(cut(span, 30, 60)))
            assert len(second.sessions) == 1
        assert_same_response(parts, await reference(span))


async def test_a_full_server_is_waited_for() -> None:
    span = make_span(20)
    engine = FakeEngine()
    info = teacher_info(engine, max_sessions=1)
    async with local_teacher(engine, info=info, evict_idle_s=0.4) as teacher:
        async with client_of(teacher.address) as client:
            await client.open(PROMPT, OPTIONS, POLICY).append(span)
            started = time.monotonic()
            await client.open(PROMPT, OPTIONS, POLICY).append(span)
            assert 0.3 < time.monotonic() - started < 5


async def test_waiting_for_a_full_server_is_bounded() -> None:
    engine = FakeEngine()
    info = teacher_info(engine, max_sessions=1)
    limits = replace(FAST, capacity_wait_s=0.5)
    async with local_teacher(engine, info=info, evict_idle_s=60) as teacher:
        async with client_of(teacher.address, limits=limits) as client:
            await client.open(PROMPT, OPTIONS, POLICY).append(make_span(5))
            with pytest.raises(CapacityError, match="limit is 1"):
                await client.open(PROMPT, OPTIONS, POLICY).append(make_span(5))


async def test_a_wrong_tokenizer_is_refused_at_connect() -> None:
    async with local_teacher() as teacher:
        with pytest.raises(FingerprintMismatchError, match="fingerprint is mine, the teacher's is"):
            async with client_of(teacher.address, tokenizer_fingerprint="mine"):
                pass


async def test_another_model_behind_the_same_address_is_refused() -> None:
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        await session.append(make_span(5))
        await server.stop()
        await server.start(info=replace(teacher_info(server.engine), weights_digest="other"))
        with pytest.raises(FingerprintMismatchError, match="weights_digest 'other'"):
            await session.append(replace(make_span(5), offset=5))


async def test_an_absent_teacher_is_named_after_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(NotReadyError, match=r"127\.0\.0\.1:1 .*0\.5 s"):
        async with client_of("127.0.0.1:1", connect_timeout_s=0.5):
            pass
    assert time.monotonic() - started < 3


async def test_a_loading_teacher_is_waited_for() -> None:
    ready_at = time.monotonic() + 0.5
    async with local_teacher(ready=lambda: time.monotonic() > ready_at) as teacher:
        async with client_of(teacher.address) as client:
            assert client.info == teacher.info


async def test_a_teacher_that_never_comes_back_is_an_error_for_every_session() -> None:
    async with restarting() as server:
        async with client_of(server.teacher.address, connect_timeout_s=0.6) as client:
            sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in range(10)]
            await asyncio.gather(*(session.append(make_span(5)) for session in sessions))
            await server.stop()
            started = time.monotonic()
            late = replace(make_span(5), offset=5)
            results = await asyncio.gather(
                *(session.append(late) for session in sessions), return_exceptions=True
            )
            assert {type(result) for result in results} == {NotReadyError}
            assert time.monotonic() - started < 5
            await asyncio.gather(*(session.close() for session in sessions))


async def test_waiting_for_an_absent_teacher_can_be_chosen() -> None:
    async with restarting() as server:
        address = server.teacher.address
        async with client_of(address, connect_timeout_s=0.2, on_absent="wait") as client:
            session = client.open(PROMPT, OPTIONS, POLICY)
            await session.append(make_span(5))
            await server.stop()
            waiting = asyncio.create_task(session.append(replace(make_span(5), offset=5)))
            await asyncio.sleep(0.8)
            assert not waiting.done()
            await server.start()
            await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize(
    ("fault", "error"),
    [(Fault.RAISE, EngineError), (Fault.CRASH, EngineError), (Fault.LEAK_NAN, NonFiniteError)],
)
async def test_an_engine_fault_is_an_error_and_the_session_stays(
    fault: Fault, error: type[Exception]
) -> None:
    span = make_span(40)
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = [await session.append(cut(span, 0, 20))]
        engine.inject(fault)
        with pytest.raises(error):
            await session.append(cut(span, 20, 40))
        assert session.num_scored == 20
        parts.append(await session.append(cut(span, 20, 40)))
        assert_same_response(parts, await reference(span))


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


async def test_a_deadline_reaches_the_server() -> None:
    engine = FakeEngine()
    limits = SchedulerLimits(max_running=1)
    async with local_teacher(engine, scheduler_limits=limits) as teacher:
        async with client_of(teacher.address) as client:
            engine.inject(Fault.HANG)
            stuck = asyncio.create_task(client.open(PROMPT, OPTIONS, None).append(make_span(5)))
            while not engine.num_queries:
                await asyncio.sleep(0.01)
            with pytest.raises(DeadlineError, match=r"0\.050 s"):
                await client.open(PROMPT, OPTIONS, None).append(make_span(5), deadline_s=0.05)
            stuck.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stuck


async def test_a_cancelled_append_does_not_confuse_the_next() -> None:
    span = make_span(60)
    engine = FakeEngine(base_latency_s=0.2)
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = [await session.append(cut(span, 0, 20))]
        waiting = asyncio.create_task(session.append(cut(make_span(60, seed=9), 20, 50)))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert session.num_scored == 20
        parts.append(await session.append(cut(span, 20, 60)))
        assert_same_response(parts, await reference(span))
        await session.close()
        assert len(teacher.sessions) == 0


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
        assert full / 2 <= min(pauses) < max(pauses) <= full
    assert backoff_s(limits, 10_000) <= 1.0


async def test_no_endpoint_is_a_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="endpoints is empty"):
        async with client_of():
            pass
