"""Fleets of trainers that are run for a while, and what was seen of them beside the arithmetic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import fmean

from benchmarks.capacity.arithmetic import Forecast, TeacherSpeed, TrainerLoad, forecast
from benchmarks.capacity.servers import Server, servers
from benchmarks.capacity.trainers import Seen, SimulatedTrainer, connected
from benchmarks.measuring import Sample

SAMPLE_S = 0.5
"""Between two looks at the metrics."""
COMPARED = ("tokens_per_s", "step_s", "open_sessions", "append_s")
"""Figures of a Forecast that are seen too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Trainers alike on replicas alike."""

    trainers: int
    load: TrainerLoad
    speed: TeacherSpeed
    replicas: int = 1

    @property
    def description(self) -> str:
        """In a line of the result file."""
        load, speed = self.load, self.speed
        return (
            f"{self.trainers} trainers of {load.rollouts} rollouts of about "
            f"{load.response_tokens:.0f} tokens at {load.tokens_per_s:g}/s in chunks of "
            f"{load.chunk_tokens}, {load.learn_s:g} s of learning, on {self.replicas} x "
            f"{speed.tokens_per_s:g} tokens/s, {speed.step_s:g} s and {speed.step_tokens} tokens a "
            "step"
        )


PLAIN = TrainerLoad(
    rollouts=8,
    tokens_per_s=20,
    response_tokens=256,
    longest_tokens=310,
    chunk_tokens=32,
    learn_s=9.0,
)
MANY = TrainerLoad(
    rollouts=24,
    tokens_per_s=12,
    response_tokens=160,
    longest_tokens=197,
    chunk_tokens=32,
    learn_s=10.0,
)
FEW = TrainerLoad(
    rollouts=3,
    tokens_per_s=24,
    response_tokens=320,
    longest_tokens=360,
    chunk_tokens=32,
    learn_s=5.0,
)
QUICK = TeacherSpeed(tokens_per_s=1000, step_s=0.15, step_tokens=1024)
SLOW = TeacherSpeed(tokens_per_s=500, step_s=0.4, step_tokens=1024)

FLEETS = {
    "one": Fleet(trainers=1, load=PLAIN, speed=QUICK),
    "half_full": Fleet(trainers=4, load=PLAIN, speed=QUICK),
    "nearly_full": Fleet(trainers=8, load=PLAIN, speed=QUICK),
    "full": Fleet(trainers=14, load=PLAIN, speed=QUICK),
    "many_rollouts": Fleet(trainers=3, load=MANY, speed=QUICK),
    "few_rollouts": Fleet(trainers=16, load=FEW, speed=QUICK),
    "slow_teacher": Fleet(trainers=4, load=FEW, speed=SLOW),
    "slow_and_full": Fleet(trainers=6, load=PLAIN, speed=SLOW),
    "two_replicas": Fleet(trainers=8, load=PLAIN, speed=SLOW, replicas=2),
}


@asynccontextmanager
async def at_work(
    fleet: Fleet, teachers: Sequence[Server], seen: Seen, seed: int
) -> AsyncIterator[None]:
    """All trainers of a fleet, each with its own client."""
    addresses = [teacher.grpc_address for teacher in teachers]
    clients = [await connected(addresses, f"trainer-{i}") for i in range(fleet.trainers)]
    tasks = [
        asyncio.create_task(
            SimulatedTrainer(client, fleet.load, seen, seed=1000 * seed + i).steps()
        )
        for i, client in enumerate(clients)
    ]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        seen.errors += [repr(e) for e in ended if not isinstance(e, asyncio.CancelledError)]
        await asyncio.gather(*(client.aclose() for client in clients))


async def watched(teachers: Sequence[Server], seconds: float) -> dict[str, float]:
    """Means of gauges of all servers together."""
    loop = asyncio.get_running_loop()
    end, sessions, queued = loop.time() + seconds, [], []
    while (now := loop.time()) < end:
        said = [await asyncio.to_thread(teacher.metrics) for teacher in teachers]
        sessions.append(sum(one['teacher_sessions{state="open"}'] for one in said))
        queued.append(
            sum(one["teacher_queue_tokens"] + one["teacher_batch_tokens"] for one in said)
        )
        await asyncio.sleep(max(0.0, now + SAMPLE_S - loop.time()))
    return {"open_sessions": fmean(sessions), "tokens_waiting": fmean(queued)}


def scored(teachers: Sequence[Server]) -> float:
    """Response tokens scored so far, by all servers."""
    return sum(
        value
        for teacher in teachers
        for name, value in teacher.metrics().items()
        if name.startswith("teacher_tokens_scored_total")
    )


async def run_fleet(fleet: Fleet, name: str, *, seed: int, warm_s: float, seconds: float) -> Sample:
    """A fleet for `seconds`, after a while in which it is not looked at. Raises RuntimeError where
    a row was lost or a trainer failed."""
    seen = Seen()
    async with servers(fleet.speed, fleet.replicas, name) as teachers:
        async with at_work(fleet, teachers, seen, seed):
            await asyncio.sleep(warm_s)
            seen.forget_times()
            before, began = await asyncio.to_thread(scored, teachers), time.monotonic()
            gauges = await watched(teachers, seconds)
            tokens = await asyncio.to_thread(scored, teachers) - before
            length_s = time.monotonic() - began
            rates = {
                "tokens_per_s": tokens / length_s,
                "step_s": fmean(seen.rollouts_s) + fmean(seen.learnt_s),
                "append_s": seen.append_s / seen.appends,
                "steps": seen.steps,
            }
            drawn = seen.drawn(fleet.load)
    if seen.errors or seen.rows_lost:
        raise RuntimeError(f"{seen.rows_lost} rows lost; {seen.errors[:1]}")
    said = forecast(drawn, trainers=fleet.trainers, speed=fleet.speed, replicas=fleet.replicas)
    return Sample(seconds=length_s, figures=rates | gauges | _forecast_figures(said))


def _forecast_figures(said: Forecast) -> dict[str, float]:
    return {f"forecast_{name}": getattr(said, name) for name in (*COMPARED, "used_share")}
