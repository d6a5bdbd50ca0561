"""Admission is bounded, fair and loses nothing."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_wire.errors import CapacityError, DeadlineError, EngineError, NonFiniteError
from tests.waiting import LIMIT_S


def query(num_tokens: int = 4, name: str = "") -> ScoreQuery:
    return ScoreQuery(
        token_ids=np.arange(num_tokens + 1, dtype=np.int32),
        first_row=1,
        candidate_ids=None,
        k=2,
        temperature=1.0,
        session=name,
    )


class Gate(FakeEngine):
    """An engine that answers when told, and remembers the order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: list[str] = []
        self.places = asyncio.Semaphore(0)

    async def score(self, query: ScoreQuery) -> EngineRows:
        self.arrived.append(query.session or "")
        await self.places.acquire()
        return await super().score(query)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def start(
    scheduler: Scheduler,
    tenant: str,
    name: str = "",
    tokens: int = 4,
    deadline_s: float | None = None,
) -> asyncio.Task[object]:
    work = scheduler.score(query(tokens, name or tenant), tenant=tenant, deadline_s=deadline_s)
    return asyncio.create_task(work)


async def test_tenants_take_turns() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1))
    tasks = [start(scheduler, "a", f"a{i}", tokens=16) for i in range(5)]
    await settle()
    tasks += [
        start(scheduler, tenant, f"{tenant}{i}", tokens=16) for i in range(2) for tenant in "bc"
    ]
    await settle()
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks)
    assert engine.arrived == ["a0", "a1", "b0", "c0", "a2", "b1", "c1", "a3", "a4"]
    assert (scheduler.num_running, scheduler.queued_tokens) == (0, 0)


async def test_no_more_than_max_running_are_in_the_engine() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=3))
    tasks = [start(scheduler, "a") for _ in range(8)]
    await settle()
    assert (len(engine.arrived), scheduler.num_running, scheduler.queued_tokens) == (3, 3, 20)
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks)


async def test_a_full_queue_refuses_with_a_hint() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1, max_queued_tokens=10))
    tasks = [start(scheduler, "a", tokens=6) for _ in range(2)]
    await settle()
    with pytest.raises(CapacityError, match=r"6 tokens are queued and 5 more pass.*10") as caught:
        await scheduler.score(query(5), tenant="b")
    assert 50 <= caught.value.retry_after_ms <= 10_000
    tasks.append(start(scheduler, "b", tokens=4))
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks)


async def test_one_query_larger_than_the_queue_may_wait() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1, max_queued_tokens=10))
    tasks = [start(scheduler, "a"), start(scheduler, "a", tokens=50)]
    await settle()
    assert scheduler.queued_tokens == 50
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks)


async def test_expired_work_never_reaches_the_engine() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1))
    running = start(scheduler, "a", "running")
    late = start(scheduler, "a", "late", deadline_s=0.01)
    with pytest.raises(DeadlineError, match=r"0\.010 s"):
        await late
    with pytest.raises(DeadlineError, match="had passed"):
        await scheduler.score(query(), tenant="a", deadline_s=-1.0)
    engine.places.release()
    await running
    assert engine.arrived == ["running"]
    assert (scheduler.num_running, scheduler.queued_tokens) == (0, 0)


@pytest.mark.parametrize("order", ["cancel first", "grant first"])
async def test_a_cancelled_waiter_gives_its_place_on(order: str) -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1))
    first, second, third = (start(scheduler, "a", name) for name in ("1", "2", "3"))
    await settle()
    if order == "cancel first":
        second.cancel()
        await settle()
        first.cancel()
    else:
        first.cancel()
        await asyncio.sleep(0)  # `second` is granted its place, but has not run yet
        second.cancel()
    engine.places.release()
    await asyncio.wait_for(third, LIMIT_S)
    assert engine.arrived == ["1", "3"]
    assert (scheduler.num_running, scheduler.queued_tokens) == (0, 0)
    await asyncio.gather(first, second, return_exceptions=True)


@pytest.mark.parametrize(
    ("fault", "error"), [(Fault.CRASH, EngineError), (Fault.NAN, NonFiniteError)]
)
async def test_a_fault_costs_its_own_query_only(fault: Fault, error: type[Exception]) -> None:
    engine = FakeEngine()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1))
    engine.inject(fault)
    failed, fine = start(scheduler, "a"), start(scheduler, "b")
    with pytest.raises(error):
        await failed
    await fine
    assert scheduler.num_running == 0


async def test_timing_says_how_long_the_engine_had_a_query() -> None:
    now = [100.0]
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(), clock=lambda: now[0])
    first = start(scheduler, "a")
    await settle()
    now[0] += 5
    second = start(scheduler, "a")
    await settle()
    now[0] += 2
    engine.places.release()
    engine.places.release()
    (_, timing), _ = await asyncio.gather(first, second)  # type: ignore[misc]
    assert (timing.queue_us, timing.engine_us) == (0, 7_000_000)


async def test_new_tokens_in_the_engine_are_bounded_and_the_next_in_turn_is_waited_for() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running_tokens=100))
    tasks = [start(scheduler, "a", "a0", 60)]
    await settle()
    tasks += [start(scheduler, "a", "large", 90), start(scheduler, "a", "small", 20)]
    await settle()
    assert engine.arrived == ["a0"]
    tasks[1].cancel()
    await settle()
    assert engine.arrived == ["a0", "small"]
    tasks.append(start(scheduler, "a", "huge", 500))
    await settle()
    for _ in tasks:
        engine.places.release()
        await settle()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert engine.arrived == ["a0", "small", "huge"]
    assert (scheduler.num_running, scheduler.queued_tokens) == (0, 0)


async def test_a_greedy_tenant_leaves_room_in_the_queue() -> None:
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1, max_queued_tokens=100))
    tasks = [start(scheduler, "greedy", tokens=10) for _ in range(20)]
    await settle()
    refused = [task for task in tasks if task.done()]
    assert scheduler.queued_tokens == 50
    assert len(refused) == 20 - 1 - 5
    for task in refused:
        error = task.exception()
        assert isinstance(error, CapacityError)
        assert "'greedy'" in error.message
        assert error.retry_after_ms >= 50
    tasks += [start(scheduler, "other", tokens=10) for _ in range(2)]
    await settle()
    assert scheduler.queued_tokens == 70
    for _ in tasks:
        engine.places.release()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 100])
async def test_beside_a_greedy_tenant_each_query_waits_for_one_other_at_most(tokens: int) -> None:
    """What "twice as long as alone" comes to without a clock: the one that has begun, then mine."""
    engine = Gate()
    scheduler = Scheduler(engine, SchedulerLimits(max_running=1, max_queued_tokens=100_000))

    async def ask_without_pause(tenant: str) -> None:
        while True:
            await scheduler.score(query(tokens, tenant), tenant=tenant)

    tasks = [asyncio.create_task(ask_without_pause("greedy")) for _ in range(64)]
    await settle()
    tasks.append(asyncio.create_task(ask_without_pause("modest")))
    for _ in range(200):
        await settle()
        engine.places.release()
    await settle()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    waits = "".join("m" if name == "modest" else "g" for name in engine.arrived).split("m")
    assert len(waits) > 95
    assert {len(others) for others in waits[1:-1]} == {1}
