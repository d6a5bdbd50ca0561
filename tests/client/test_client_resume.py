"""The client loses, repeats and changes no row, whatever server and network do.

Run: pytest tests/client/test_client_resume.py
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import (
    CapacityError,
    EngineError,
    FingerprintMismatchError,
    NonFiniteError,
    NotReadyError,
)
from teacher_wire.records import Scores, TokenSpan
from tests.client.client_sessions import (
    FAST,
    OPTIONS,
    POLICY,
    PROMPT,
    append_all,
    client_of,
    make_span,
    reference,
    restarting,
)
from tests.teacher.scoring.fake_rows import assert_same_response, cut
from tests.waiting import LIMIT_S, eventually


async def test_a_restarted_server_changes_nothing() -> None:
    span = make_span(120)
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = await append_all(session, cut(span, 0, 50))
        await server.stop()
        waiting = asyncio.create_task(append_all(session, cut(span, 0, 90)))
        await asyncio.sleep(0.1)
        await server.start()
        parts += await asyncio.wait_for(waiting, LIMIT_S)
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
        parts.append(await asyncio.wait_for(waiting, LIMIT_S))
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
        answers = await asyncio.wait_for(asyncio.gather(*work), LIMIT_S)
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
    policy = replace(POLICY, metric=OverlapRatio(k=8, threshold=1.0))
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


async def test_a_full_server_is_waited_for() -> None:
    span = make_span(20)
    engine = FakeEngine()
    info = teacher_info(engine, max_sessions=1)
    async with local_teacher(engine, info=info, evict_idle_s=1.0) as teacher:

        def refused() -> int:
            text = teacher.metrics.render().decode()
            found = re.findall(r'^teacher_errors_total{type="CapacityError"} (\S+)$', text, re.M)
            return int(sum(map(float, found)))

        async with client_of(teacher.address) as client:
            await client.open(PROMPT, OPTIONS, POLICY).append(span)
            await client.open(PROMPT, OPTIONS, POLICY).append(span)
            assert refused() > 0


async def test_waiting_for_a_full_server_is_bounded() -> None:
    engine = FakeEngine()
    info = teacher_info(engine, max_sessions=1)
    limits = replace(FAST, capacity_wait_s=0.5)
    async with local_teacher(engine, info=info, evict_idle_s=60) as teacher:
        async with client_of(teacher.address, limits=limits) as client:
            await client.open(PROMPT, OPTIONS, POLICY).append(make_span(5))
            with pytest.raises(CapacityError, match="limit is 1"):
                await client.open(PROMPT, OPTIONS, POLICY).append(make_span(5))


async def test_another_model_behind_the_same_address_is_refused() -> None:
    async with restarting() as server, client_of(server.teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        await session.append(make_span(5))
        await server.stop()
        await server.start(info=replace(teacher_info(server.engine), weights_digest="other"))
        with pytest.raises(FingerprintMismatchError, match="weights_digest 'other'"):
            await session.append(replace(make_span(5), offset=5))


async def test_an_absent_teacher_is_named_after_the_timeout() -> None:
    with pytest.raises(NotReadyError, match=r"127\.0\.0\.1:1 .*0\.5 s"):
        async with client_of("127.0.0.1:1", connect_timeout_s=0.5):
            pass


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
            late = replace(make_span(5), offset=5)
            results = await asyncio.gather(
                *(session.append(late) for session in sessions), return_exceptions=True
            )
            assert {type(result) for result in results} == {NotReadyError}
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
            await asyncio.wait_for(waiting, LIMIT_S)


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


async def test_a_cancelled_append_does_not_confuse_the_next() -> None:
    span = make_span(60)
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = [await session.append(cut(span, 0, 20))]
        engine._base_latency_s = 1.0
        waiting = asyncio.create_task(session.append(cut(make_span(60, seed=9), 20, 50)))
        await eventually(lambda: engine.num_queries == 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert session.num_scored == 20
        parts.append(await session.append(cut(span, 20, 60)))
        assert_same_response(parts, await reference(span))
        await session.close()
        assert len(teacher.sessions) == 0


async def test_a_score_call_survives_a_restart() -> None:
    span = make_span(60)
    async with restarting() as server, client_of(server.teacher.address) as client:
        server.engine.inject(Fault.HANG)
        waiting = asyncio.create_task(client.score(PROMPT, span, OPTIONS, POLICY))
        while not server.engine.num_queries:
            await asyncio.sleep(0.01)
        await server.stop()
        await server.start()
        scores = await asyncio.wait_for(waiting, LIMIT_S)
        assert_same_response([scores], await reference(span))


async def test_a_score_call_ends_with_its_client() -> None:
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, client_of(teacher.address) as client:
        engine.inject(Fault.HANG)
        waiting = asyncio.create_task(client.score(PROMPT, make_span(5), OPTIONS, POLICY))
        while not engine.num_queries:
            await asyncio.sleep(0.01)
        await client.aclose()
        with pytest.raises(NotReadyError, match="closed"):
            await asyncio.wait_for(waiting, LIMIT_S)
