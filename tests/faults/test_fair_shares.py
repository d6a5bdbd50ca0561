"""A greedy tenant costs the others nothing: a server process under trainers that never stop.

The engine is the bottleneck and its speed is set, so that shares are known; all figures are counts.
Run: pytest tests/faults/test_fair_shares.py
"""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.concurrency import jain_index
from teacher_server.access.tenants import Tenant
from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import local_teacher
from teacher_wire.errors import CapacityError, QuotaError, RateLimitedError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import TokenSpan
from teacher_wire.status import decode_error
from tests.faults.live_server import live_server
from tests.faults.loads import Race, Tally
from tests.teacher.rpc.raw_streams import Raw, stub_of

APPEND = 64
SLOW_ENGINE = ("--max-running", "1", "--fake-tokens-per-s", "2000")
"""31 appends of 64 tokens a second, one after the other: the trainers' process keeps up with it on
a busy machine."""


async def shares(address: str, num_answers: int, **sessions: int) -> dict[str, Tally]:
    """What each tenant gets of so many answers while all ask, by name and number of sessions."""
    race = Race(num_answers)
    await asyncio.gather(
        *(
            race.run(address, name, sessions=count, append_tokens=APPEND)
            for name, count in sessions.items()
        )
    )
    return race.tallies


@pytest.mark.e2e
def test_64_sessions_leave_a_tenant_with_four_its_share(tmp_path: Path) -> None:
    """Four sessions, so that one of them always waits in the queue."""
    with live_server(tmp_path, *SLOW_ENGINE) as teacher:
        got = asyncio.run(shares(teacher.address, 200, greedy=64, modest=4))
        modest, greedy = got["modest"], got["greedy"]
        waits = {name: statistics.median(tally.overtaken) for name, tally in got.items()}
        print(f"overtaken {waits}, modest's answers {modest.num_answers} of 200")  # noqa: T201
        assert modest.num_answers >= 0.9 * 0.5 * (modest.num_answers + greedy.num_answers)
        # The two take turns: an append waits for one of the other's before each of its own tenant's
        # four (test_scheduler.py proves that it is never more). Starved it would wait for 64.
        assert waits["modest"] <= 6
        assert waits["greedy"] > waits["modest"]


@pytest.mark.e2e
def test_four_equal_tenants_get_equal_shares_whatever_they_ask(tmp_path: Path) -> None:
    with live_server(tmp_path, *SLOW_ENGINE) as teacher:
        got = asyncio.run(shares(teacher.address, 200, a=4, b=8, c=24, d=64))
        tokens = [tally.num_tokens for tally in got.values()]
        print(f"tokens {tokens}, Jain {jain_index(tokens):.4f}")  # noqa: T201
        assert jain_index(tokens) >= 0.95


class Table:
    """Tenants by name; a name that is not there is refused."""

    def __init__(self, *tenants: Tenant) -> None:
        self.by_name = {each.name: each for each in tenants}

    def get(self, name: str) -> Tenant:
        return self.by_name[name]


async def test_shares_follow_the_weights() -> None:
    table = Table(Tenant(name="light"), Tenant(name="heavy", weight=3.0))
    engine = FakeEngine(prefill_tokens_per_s=8000.0)
    limits = SchedulerLimits(max_running=1)
    async with local_teacher(engine, tenants=table, scheduler_limits=limits) as teacher:
        got = await shares(teacher.address, 320, light=8, heavy=8)
    assert got["heavy"].num_tokens / got["light"].num_tokens == pytest.approx(3.0, rel=0.15)


async def test_a_small_hold_on_a_batching_engine_keeps_the_queue_where_it_is_fair() -> None:
    """What stands in the engine is out of the scheduler's hands: a modest tenant waits for it."""
    waits = {}
    for held in (64 * APPEND, 2 * APPEND):
        engine = FakeEngine(prefill_tokens_per_s=5000.0, step_tokens=8 * APPEND)
        limits = SchedulerLimits(max_running_tokens=held)
        async with local_teacher(engine, scheduler_limits=limits) as teacher:
            got = await shares(teacher.address, 300, greedy=64, modest=1)
        waits[held] = statistics.median(got["modest"].overtaken)
    assert waits[2 * APPEND] < 0.25 * waits[64 * APPEND], waits


@pytest.mark.parametrize(
    ("limits", "error"),
    [
        ({}, CapacityError),
        ({"max_tokens_in_flight": 10 * APPEND}, QuotaError),
        ({"tokens_per_minute": 10 * APPEND}, RateLimitedError),
    ],
)
async def test_whatever_is_not_scored_is_answered_with_its_reason_and_a_hint(
    limits: dict[str, int], error: type[CapacityError]
) -> None:
    engine = FakeEngine(prefill_tokens_per_s=20_000.0)
    room = SchedulerLimits(max_running=1, max_queued_tokens=20 * APPEND)
    table = Table(Tenant(name="greedy", **limits))
    async with local_teacher(engine, tenants=table, scheduler_limits=room) as teacher:
        async with stub_of(teacher) as stub:
            raw = Raw(stub)
            await raw.send(hello=pb.Hello(protocol_version=1, run_id="greedy"))
            names = [f"s{i}" for i in range(64)]
            for name in names:
                await raw.open(name, policy=None)
            span = TokenSpan(offset=0, token_ids=np.arange(APPEND, dtype=np.int32))
            for name in names:
                await raw.append(span, name)
            scored, refused = set(), set()
            while len(scored) + len(refused) < len(names):
                reply = await raw.receive()
                if reply.HasField("scores"):
                    scored.add(reply.scores.session_id)
                elif reply.HasField("error"):
                    told = decode_error(reply.error)
                    assert type(told) is error
                    assert told.retry_after_ms > 0
                    refused.add(reply.error.session_id)
            assert scored | refused == set(names)
            assert len(scored) >= 10
            assert refused
            assert engine.num_queries == len(scored)
            raw.call.cancel()


async def test_a_tenants_sessions_are_its_own_limit() -> None:
    table = Table(Tenant(name="a", max_sessions=2), Tenant(name="b", max_sessions=2))
    async with local_teacher(tenants=table, evict_idle_s=60.0) as teacher:
        async with stub_of(teacher) as stub:
            streams = []
            for name in "ab":
                raw = Raw(stub)
                streams.append(raw)
                await raw.send(hello=pb.Hello(protocol_version=1, run_id=name))
                await raw.receive()
                for session in ("1", "2", "3"):
                    await raw.open(session)
                kinds = {}
                for _ in range(3):
                    reply = await raw.receive()
                    kinds[reply.WhichOneof("message")] = reply
                told = decode_error(kinds["error"].error)
                assert type(told) is QuotaError
                assert told.retry_after_ms > 0
                assert kinds["error"].error.session_id == "3"
            assert len(teacher.sessions) == 4
            for raw in streams:
                raw.call.cancel()
