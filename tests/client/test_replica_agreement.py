"""Replicas that give other rows are not used: at the start the run is refused, later they are left.

Run: pytest tests/client/test_replica_agreement.py
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from teacher_client.agreement import EXACT_NATS, ROUNDED_NATS, Agreement, Probe
from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import teacher_info
from teacher_wire.errors import FingerprintMismatchError
from teacher_wire.records import TeacherInfo
from tests.client.client_sessions import (
    OPTIONS,
    PROMPT,
    Restarting,
    append_all,
    client_of,
    make_span,
)
from tests.waiting import eventually

TOKENS = np.arange(3, 67, dtype=np.int32)
INFO = teacher_info(FakeEngine())


class Shifted(FakeEngine):
    """Other weights: every log-prob is off by so much."""

    def __init__(self, nats: float, **engine: float) -> None:
        super().__init__(**engine)  # type: ignore[arg-type]
        self.nats = nats

    async def score(self, query: ScoreQuery) -> EngineRows:
        rows = await super().score(query)
        return replace(rows, token_logprobs=rows.token_logprobs - np.float32(self.nats))


@asynccontextmanager
async def teachers(*engines: FakeEngine) -> AsyncIterator[list[Restarting]]:
    async with AsyncExitStack() as stack:
        servers = []
        for engine in engines:
            server = Restarting()
            server.engine = engine
            await server.start()
            stack.push_async_callback(server.stop)
            servers.append(server)
        yield servers


def addresses(servers: list[Restarting]) -> list[str]:
    return [server.teacher.address for server in servers]


async def test_replicas_that_agree_score_one_text_each() -> None:
    async with teachers(Shifted(0.0), Shifted(EXACT_NATS / 20)) as servers:
        async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)) as client:
            assert [server.engine.num_queries for server in servers] == [1, 1]
            assert [server.engine.num_rows for server in servers] == [63, 63]
            assert len(await append_all(client.open(PROMPT, OPTIONS, None), make_span(30))) == 3


async def test_one_replica_alone_scores_none() -> None:
    async with teachers(FakeEngine()) as servers:
        async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)):
            assert servers[0].engine.num_queries == 0


async def test_replicas_that_disagree_are_refused_by_name() -> None:
    async with teachers(FakeEngine(), Shifted(0.25)) as servers:
        with pytest.raises(FingerprintMismatchError, match="replicas disagree") as refused:
            async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)):
                pass
        text = refused.value.message
        assert all(address in text for address in addresses(servers))
        assert "0.25 nats apart (mean 0.25)" in text
        assert "max_replica_gap_nats is 0.001" in text
        # The same pair, where that much is allowed.
        async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS, bound_nats=3.0)):
            pass


async def test_a_replica_that_takes_long_to_answer_is_waited_for() -> None:
    asked = asyncio.Event()

    class Late(Shifted):
        async def score(self, query: ScoreQuery) -> EngineRows:
            asked.set()
            return await super().score(query)

    class Behind(FakeEngine):
        async def score(self, query: ScoreQuery) -> EngineRows:
            await asked.wait()
            return await super().score(query)

    # Longer than replicas that have said nothing are waited for.
    async with teachers(Behind(), Late(0.25, base_latency_s=1.3)) as servers:
        with pytest.raises(FingerprintMismatchError, match="replicas disagree"):
            async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)):
                pass


async def test_a_replica_that_comes_back_with_other_rows_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="teacher_client")
    other = Shifted(0.0)
    async with teachers(FakeEngine(), other) as servers:
        async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)) as client:
            await servers[1].stop()
            name = addresses(servers)[1]
            await eventually(lambda: f"{name} is not up" in caplog.text)
            assert "its sessions go on at the 1 of 2 that are" in caplog.text
            other.nats = 0.25
            await servers[1].start()
            await eventually(lambda: f"{name} is not used: replicas disagree" in caplog.text)
            before = other.num_queries
            sessions = [client.open(PROMPT, OPTIONS, None) for _ in range(8)]
            await asyncio.gather(*(append_all(session, make_span(20)) for session in sessions))
            assert {s._opened_on.endpoint for s in sessions if s._opened_on} == {
                addresses(servers)[0]
            }
            assert other.num_rows == 63 * before  # probes alone


async def test_a_replica_that_is_away_at_the_start_is_named_and_compared_when_it_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="teacher_client")
    async with teachers(FakeEngine(), FakeEngine()) as servers:
        away = addresses(servers)[1]
        await servers[1].stop()
        async with client_of(*addresses(servers), probe=Probe(token_ids=TOKENS)):
            [warned] = [r.message for r in caplog.records if "is not up" in r.message]
            assert warned.startswith(f"{away} is not up, its sessions go on at the 1 of 2 that are")
            await servers[1].start()
            await eventually(lambda: f"{away} is up" in caplog.text)
            assert servers[1].engine.num_queries == 1


def made(*logprobs: list[float]) -> Agreement[int]:
    """Of streams that are numbers, and rows that are given."""

    async def score(stream: int, token_ids: np.ndarray) -> np.ndarray:
        return np.array(logprobs[stream], np.float32)

    return Agreement(Probe(token_ids=TOKENS), score)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", EXACT_NATS), ("bfloat16", ROUNDED_NATS)])
async def test_the_bound_is_of_the_dtype_at_one_token_and_a_tenth_on_average(
    dtype: str, bound: float
) -> None:
    info = replace(INFO, dtype=dtype)
    one_token = [0.0] * 20
    one_token[7] = 0.95 * bound
    everywhere = [0.2 * bound] * 20
    agreement = made([0.0] * 20, one_token, everywhere)
    await agreement.check("a", 0, info)
    await agreement.check("b", 1, info)
    with pytest.raises(FingerprintMismatchError, match="gives token 1 the log-prob"):
        await agreement.check("c", 2, info)
    too_far = made([0.0] * 20, [0.0] * 7 + [1.1 * bound] + [0.0] * 12)
    await too_far.check("a", 0, info)
    with pytest.raises(FingerprintMismatchError, match="gives token 8 the log-prob"):
        await too_far.check("b", 1, info)


def test_a_teacher_is_asked_what_it_can_know() -> None:
    probe = Probe(token_ids=np.arange(1000, dtype=np.int32))
    small: TeacherInfo = replace(INFO, vocab_size=40, max_context=8192)
    assert probe.of(small).tolist() == list(range(40))
    short = replace(INFO, vocab_size=512, max_context=16)
    assert probe.of(short).tolist() == list(range(16))
    assert len(probe.of(INFO)) == 128
