"""Background work gets its share beside foreground work, and all where there is none. Pure, but for
the scheduler in the end. Run: pytest tests/teacher/admission/test_pace.py
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.access.tenants import Tenant
from teacher_server.admission.pace import Pace
from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.fake_engine import FakeEngine
from teacher_wire.errors import CapacityError, DeadlineError
from tests.teacher.admission.test_scheduler import Gate, query, settle


def made(share: float = 0.1, quiet_s: float = 0.1) -> tuple[Pace, list[float]]:
    now = [0.0]
    return Pace(share=share, quiet_s=quiet_s, clock=lambda: now[0]), now


@given(
    share=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    foreground=st.lists(st.integers(1, 500), min_size=20, max_size=80),
    piece=st.integers(1, 500),
)
def test_background_gets_its_share_of_the_tokens_and_one_query(
    share: float, foreground: list[int], piece: int
) -> None:
    pace, _ = made(share)
    pace.arrive("trainer", 1.0)
    given_tokens = 0
    for tokens in foreground:
        while pace.allows("reader"):
            pace.background("reader", piece)
            given_tokens += piece
        pace.foreground(tokens, lambda name: 1.0)
    assert given_tokens <= share * sum(foreground) + piece + 1e-3
    # What pays for more than is owed is not saved up: a payment is lost for each piece at most.
    paid = share * sum(foreground)
    assert given_tokens >= paid * piece / (piece + share * max(foreground)) - 1e-3


def test_weights_of_tenants_count_on_both_sides() -> None:
    """Two trainers of weight 1 and 3 share the engine 1:3; a reader of weight 2 weighs 0.2."""
    pace, _ = made()
    pace.arrive("a", 1.0)
    pace.arrive("b", 3.0)
    weights = {"reader": 2.0, "other": 1.0}
    got: Counter[str] = Counter()
    for _ in range(2000):
        for name in weights:
            if pace.allows(name):
                pace.background(name, 10)
                got[name] += 10
        pace.foreground(100, weights.__getitem__)
    assert got["reader"] / 200_000 == pytest.approx(0.2 / 4.0, rel=0.02)
    assert got["other"] / 200_000 == pytest.approx(0.1 / 4.0, rel=0.02)


def test_without_foreground_work_nothing_is_owed_once_it_has_been_quiet_for_a_while() -> None:
    pace, now = made()
    pace.background("reader", 1000)
    assert pace.allows("reader")
    pace.arrive("trainer", 1.0)
    pace.background("reader", 1000)
    assert not pace.allows("reader")
    pace.leave("trainer")
    assert not pace.has_foreground
    assert not pace.allows("reader")  # it may only be between two appends
    now[0] += 0.1
    assert pace.allows("reader")
    pace.background("reader", 1000)
    pace.arrive("trainer", 1.0)
    assert pace.allows("reader")
    pace.background("reader", 1000)
    assert not pace.allows("reader")
    pace.leave("trainer", more_follows=False)
    assert pace.allows("reader")


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        made(0.0)


class Counting(FakeEngine):
    """Who has had how many tokens; each query takes a turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: Counter[str] = Counter()

    async def score(self, query: ScoreQuery) -> EngineRows:
        self.tokens[query.cache_salt] += len(query.token_ids) - query.first_row
        await asyncio.sleep(0)
        return await super().score(query)


@pytest.mark.parametrize("sessions", [1, 8])
async def test_one_loop_of_analysis_costs_a_trainer_no_more_than_its_share(sessions: int) -> None:
    """Even where the engine has room for all, and nobody would ever stand in line."""
    engine = Counting()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=64))
    done = asyncio.Event()

    async def ask(name: str, tokens: int, background: bool) -> None:
        asked = query(tokens)
        salted = ScoreQuery(
            token_ids=asked.token_ids,
            first_row=1,
            candidate_ids=None,
            k=2,
            temperature=1.0,
            cache_salt=name,
        )
        while not done.is_set():
            await scheduler.score(salted, tenant=name, background=background)
            if engine.tokens["trainer"] >= 4_000:
                done.set()

    trainers = [asyncio.create_task(ask("trainer", 64, False)) for _ in range(sessions)]
    reader = asyncio.create_task(ask("reader", 250, True))
    await asyncio.gather(*trainers)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    share = engine.tokens["reader"] / engine.tokens["trainer"]
    assert 0.05 < share < 0.13
    assert (scheduler.num_running, scheduler.num_queued, scheduler.queued_tokens) == (0, 0, 0)


async def test_held_work_goes_on_when_the_foreground_falls_silent() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(), quiet_s=0.01)
    front = asyncio.create_task(scheduler.score(query(name="front"), tenant="trainer"))
    await settle()
    back = [
        asyncio.create_task(
            scheduler.score(query(name=f"back{i}"), tenant="reader", background=True)
        )
        for i in range(3)
    ]
    await settle()
    assert engine.arrived == ["front", "back0"]
    assert (scheduler.num_queued, scheduler.queued_tokens) == (2, 8)
    for _ in range(4):
        engine.places.release()
    await asyncio.gather(front, *back)
    assert engine.arrived == ["front", "back0", "back1", "back2"]


async def test_nothing_is_waited_for_after_a_call_that_nothing_follows() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(), quiet_s=60.0)
    for _ in range(4):
        engine.places.release()
    front = asyncio.create_task(scheduler.score(query(), tenant="trainer", more_follows=False))
    await settle()
    for _ in range(3):
        await scheduler.score(query(), tenant="reader", background=True)
    await front


async def test_held_work_can_expire_be_cancelled_and_be_too_much() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_queued_tokens=20), quiet_s=60.0)
    front = asyncio.create_task(scheduler.score(query(), tenant="trainer"))
    await settle()
    first = asyncio.create_task(scheduler.score(query(), tenant="reader", background=True))
    await settle()
    held = asyncio.create_task(scheduler.score(query(6), tenant="reader", background=True))
    await settle()
    with pytest.raises(DeadlineError, match=r"0\.010 s"):
        await scheduler.score(query(2), tenant="reader", background=True, deadline_s=0.01)
    with pytest.raises(CapacityError, match="6 tokens"):
        await scheduler.score(query(15), tenant="reader", background=True)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert (scheduler.num_queued, scheduler.queued_tokens) == (0, 0)
    engine.places.release()
    engine.places.release()
    await asyncio.gather(front, first)
    assert engine.num_queries == 2


async def test_foreground_work_is_never_held_back() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits())
    tasks = [asyncio.create_task(scheduler.score(query(), tenant="a")) for _ in range(5)]
    await settle()
    assert len(engine.arrived) == 5
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks)


async def test_a_tenant_of_more_weight_may_read_more() -> None:
    class Table:
        def get(self, name: str) -> Tenant:
            return Tenant(name=name, weight=4.0 if name == "reader" else 1.0)

    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(), tenants=Table(), quiet_s=60.0)
    for _ in range(100):
        engine.places.release()
    front = asyncio.create_task(scheduler.score(query(4), tenant="trainer"))
    await settle()
    await scheduler.score(query(40), tenant="reader", background=True)
    await front
    back = asyncio.create_task(scheduler.score(query(40), tenant="reader", background=True))
    num_appends = 0
    while not back.done():
        await scheduler.score(query(10), tenant="trainer")
        await settle()
        num_appends += 1
    # 40 tokens of debt, of which 10 x 0.1 x 4 are paid by each append.
    assert num_appends == 10
