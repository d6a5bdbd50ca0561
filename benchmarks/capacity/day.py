"""A day of trainers that come and go, on a clock that runs faster: what is asked for is answered,
and nothing that the server holds grows.

Every time and rate of the day is divided or multiplied by `FASTER`, the engine's too, so that as
many rollouts, appends and rows are made as in a day of such a teacher. What is counted goes into a
file after every hour of the day; the same command goes on from there, with a new server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.capacity.arithmetic import TeacherSpeed, TrainerLoad
from benchmarks.capacity.servers import Server, servers
from benchmarks.capacity.trainers import Seen, SimulatedTrainer, connected
from student_trainer.process.writing import write_whole

FASTER = 40.0
"""Seconds of the day in one of the clock."""
HOURS = 24
PLACES = 6
"""Trainers at once; each place is empty between two of them."""
SPEED = TeacherSpeed(tokens_per_s=200.0, step_s=1.6, step_tokens=2048)
"""Of the day: a teacher on a CPU."""
LIFE_S, PAUSE_S = (1800.0, 14_400.0), (60.0, 1800.0)
"""From least to most, of the day."""
KILLED_SHARE = 0.4
"""Of trainers that go in the middle of their appends, without a word."""
LIMITS = {
    "--max-sessions": 512,
    "--max-queued-tokens": 262_144,
    "--session-ttl-s": 10,
    # What a server has unless it is told: the others wait in its line, not in the engine's.
    "--max-running": 64,
    "--max-running-tokens": 16_384,
}
SAMPLE_S = 2.0
BOUNDED = {
    'teacher_sessions{state="open"}': "sessions",
    "teacher_queue_tokens": "queued_tokens",
    "teacher_queue_depth": "queue_depth",
    "teacher_batch_sessions": "in_the_engine",
    "teacher_send_queue_bytes": "send_queue_bytes",
}


@dataclass(slots=True)
class Counts:
    """What one or several hours came to."""

    hours: int = 0
    rows_asked: int = 0
    rows_received: int = 0
    given_up_rows: int = 0
    appends: int = 0
    rollouts: int = 0
    steps: int = 0
    trainers: int = 0
    killed: int = 0
    starts: int = 0
    """Of the server: one, and one more each time that the day was cut off."""
    most: dict[str, float] = field(default_factory=dict)
    """The largest value of each gauge that has a bound."""
    tenants: int = 0
    """Names of trainers that metrics know."""
    left: dict[str, float] = field(default_factory=dict)
    """The same gauges when all have gone."""
    errors: list[str] = field(default_factory=list)
    refused: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, float]] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        """What trainers have seen since the last time, but for what is under way."""
        self.rows_asked += seen.rows_asked - seen.rows_under_way
        seen.rows_asked = seen.rows_under_way
        for name in ("rows_received", "given_up_rows", "appends", "rollouts", "steps"):
            setattr(self, name, getattr(self, name) + getattr(seen, name))
            setattr(seen, name, 0)
        self.errors += seen.errors
        seen.errors.clear()
        seen.forget_times()


def load_of(rng: random.Random) -> TrainerLoad:
    """One that comes: small or large, on the clock that runs faster."""
    length = rng.choice((96.0, 192.0, 320.0))
    return TrainerLoad(
        rollouts=rng.choice((8, 16, 32, 64)),
        tokens_per_s=rng.uniform(1.0, 2.5) * FASTER,
        response_tokens=length,
        longest_tokens=1.25 * length,
        chunk_tokens=rng.choice((16, 32)),
        learn_s=rng.uniform(60.0, 240.0) / FASTER,
    )


async def place(server: Server, seen: Seen, counts: Counts, number: int) -> None:
    """One trainer after the other, until it is cancelled."""
    rng = random.Random(1000 * counts.starts + number)
    while True:
        await asyncio.sleep(rng.uniform(*PAUSE_S) / FASTER)
        counts.trainers += 1
        client = await connected([server.grpc_address], f"run-{counts.starts}-{counts.trainers}")
        trainer = SimulatedTrainer(client, load_of(rng), seen, seed=rng.getrandbits(32))
        life = asyncio.create_task(trainer.steps())
        try:
            await asyncio.wait([life], timeout=rng.uniform(*LIFE_S) / FASTER)
            if not life.done() and rng.random() < KILLED_SHARE:
                counts.killed += 1
                await trainer.kill()
        finally:
            life.cancel()
            ended = await asyncio.gather(life, return_exceptions=True)
            seen.errors += [repr(e) for e in ended if not isinstance(e, asyncio.CancelledError)]
            await client.aclose()


async def hours_of(server: Server, counts: Counts, hours: int, kept: Callable[[], None]) -> None:
    """What is left of so many hours; `kept` is called after each."""
    seen, loop = Seen(), asyncio.get_running_loop()
    places = [asyncio.create_task(place(server, seen, counts, n)) for n in range(PLACES)]
    try:
        while counts.hours < hours:
            end = loop.time() + 3600 / FASTER
            while (now := loop.time()) < end:
                await asyncio.to_thread(look, server, counts, counts.hours)
                await asyncio.sleep(max(0.0, min(now + SAMPLE_S, end) - loop.time()))
            counts.add(seen)
            counts.hours += 1
            kept()
    finally:
        for task in places:
            task.cancel()
        ended = await asyncio.gather(*places, return_exceptions=True)
        counts.add(seen)
        counts.errors += [repr(e) for e in ended if not isinstance(e, asyncio.CancelledError)]


def look(server: Server, counts: Counts, hour: int) -> None:
    """At the gauges, the memory and the descriptors."""
    said = server.metrics()
    now = {short: said[name] for name, short in BOUNDED.items()}
    for name, value in now.items():
        counts.most[name] = max(counts.most.get(name, 0.0), value)
    counts.tenants = sum(name.startswith("teacher_tokens_scored_total") for name in said)
    counts.refused = {
        name: value
        for name, value in said.items()
        if value and (name.startswith("teacher_errors_total") or 'outcome="refused"' in name)
    }
    counts.samples.append(
        {
            "hour": hour,
            "rss_mb": round(server.rss_mb(), 2),
            "fds": server.num_fds(),
            "sessions": now["sessions"],
        }
    )


async def run_day(path: Path, hours: int, said: Callable[[str], None]) -> dict[str, Any]:
    """Goes on with the day whose counts are in the file, or begins one."""
    counts = Counts(**json.loads(path.read_text())) if path.exists() else Counts()
    counts.starts += 1
    fast = TeacherSpeed(
        tokens_per_s=SPEED.tokens_per_s * FASTER,
        step_s=SPEED.step_s / FASTER,
        step_tokens=SPEED.step_tokens,
    )
    limits = [word for flag, value in LIMITS.items() for word in (flag, str(value))]

    def kept() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(counts)))
        said(
            f"hour {counts.hours}/{hours}: {counts.rows_received:,} rows of {counts.rows_asked:,}, "
            f"{counts.trainers} trainers, at most {counts.most['sessions']:.0f} sessions"
        )

    async with servers(fast, 1, "day", *limits) as (server,):
        await hours_of(server, counts, hours, kept)
        # Sessions whose trainers are gone end by themselves.
        await asyncio.sleep(float(LIMITS["--session-ttl-s"]) + 5)
        left = await asyncio.to_thread(server.metrics)
        counts.left = {short: left[name] for name, short in BOUNDED.items()}
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return summary(counts)


def summary(counts: Counts) -> dict[str, Any]:
    """What is to be said of a day, without its samples."""
    by_hour = [
        [one for one in counts.samples if one["hour"] == hour] for hour in range(counts.hours)
    ]
    memory = [float(np.median([one["rss_mb"] for one in hour])) for hour in by_hour if hour]
    files = [float(np.median([one["fds"] for one in hour])) for hour in by_hour if hour]
    said = {name: value for name, value in asdict(counts).items() if name != "samples"}
    return said | {
        "rows_lost": counts.rows_asked - counts.rows_received - counts.given_up_rows,
        "limits": LIMITS,
        "faster": FASTER,
        "rss_mb_by_hour": memory,
        "fds_by_hour": files,
        "rss_mb_an_hour_of_the_day": slope(memory),
    }


def slope(values: list[float]) -> float | None:
    """Theil-Sen over the last three quarters; None of fewer than four values."""
    kept = values[len(values) // 4 :]
    if len(kept) < 3:
        return None
    first, second = np.triu_indices(len(kept), k=1)
    points = np.array(kept)
    return round(float(np.median((points[second] - points[first]) / (second - first))), 4)


def broken(said: dict[str, Any]) -> list[str]:
    """What a day has not kept, in words; nothing where all is well."""
    found = []
    if said["rows_lost"]:
        found.append(f"{said['rows_lost']} rows lost")
    if said["errors"]:
        found.append(f"errors: {said['errors'][:3]}")
    if said["most"]["sessions"] > LIMITS["--max-sessions"]:
        found.append(f"{said['most']['sessions']} sessions of {LIMITS['--max-sessions']}")
    if said["most"]["queued_tokens"] > LIMITS["--max-queued-tokens"]:
        found.append(f"{said['most']['queued_tokens']} tokens queued")
    if any(said["left"].values()):
        found.append(f"left behind: {said['left']}")
    return found
