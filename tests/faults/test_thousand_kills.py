"""Random kills of servers, connections and clients change, lose and repeat no row.

Servers and clients are real processes and end by SIGKILL; connections are reset in the middle of a
frame. Run: pytest tests/faults/test_thousand_kills.py. `make faults` kills a thousand processes
(tests/rounds.py).
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from tests.faults.cut_proxy import CutProxy, cut_proxy
from tests.faults.forked_processes import ForkedTeacher, forked
from tests.faults.random_responses import (
    OPTIONS,
    POLICY,
    PROMPT,
    VOCAB_SIZE,
    assert_exactly_once,
    random_span,
    score_in_pieces,
)
from tests.rounds import ROUNDS
from tests.teacher.scoring.fake_rows import cut
from tests.waiting import LIMIT_S, eventually

log = logging.getLogger(__name__)
pytestmark = pytest.mark.e2e

SETTINGS = {"fake_vocab_size": VOCAB_SIZE, "max_k": 16, "fake_latency_s": 0.002}
PATIENT = RetryLimits(
    first_backoff_s=0.005, max_backoff_s=0.05, max_resends=10_000, max_reopens=10_000
)
MAX_GROWTH_PER_KILL = 1024
"""Bytes."""


async def connect(*addresses: str) -> TeacherClient:
    """A client that never gives up."""
    return await TeacherClient.connect(
        addresses,
        tokenizer_fingerprint="",
        vocab_size=VOCAB_SIZE,
        run_id="kills",
        connect_timeout_s=LIMIT_S,
        on_absent="wait",
        limits=PATIENT,
    )


class Work:
    """Responses that are scored without a pause until told to stop, each checked at its end."""

    def __init__(self, clients: list[TeacherClient], *, seed: int) -> None:
        self.num_responses = 0
        self.num_tokens = 0
        self._clients = clients
        self._rng = np.random.default_rng(seed)
        self._stop = asyncio.Event()

    async def run(self, num_lanes: int) -> None:
        """Returns after `stop`, when what had begun is finished and found right."""
        await asyncio.gather(*(self._lane(number) for number in range(num_lanes)))

    def stop(self) -> None:
        self._stop.set()

    async def _lane(self, number: int) -> None:
        client = self._clients[number % len(self._clients)]
        while not self._stop.is_set():
            span = random_span(self._rng, int(self._rng.integers(20, 300)))
            parts = await score_in_pieces(client, span)
            await assert_exactly_once(parts, span)
            self.num_responses += 1
            self.num_tokens += len(span)


@asynccontextmanager
async def replicas(
    folder: Path, count: int
) -> AsyncIterator[tuple[list[ForkedTeacher], list[CutProxy]]]:
    """Servers, each behind a relay that resets its connections after a random number of bytes."""
    teachers = [ForkedTeacher(folder, **SETTINGS) for _ in range(count)]
    try:
        for teacher in teachers:
            teacher.start()
        async with AsyncExitStack() as stack:
            proxies = []
            for teacher in teachers:
                await teacher.until_ready()
                relay = cut_proxy(teacher.port, lambda: int(random.expovariate(1 / 60_000)))
                proxies.append(await stack.enter_async_context(relay))
            yield teachers, proxies
    finally:
        for teacher in teachers:
            teacher.kill()


@pytest.mark.timeout(ROUNDS.timeout_s)
async def test_kills_of_servers_and_connections_change_lose_and_repeat_no_row(
    tmp_path: Path,
) -> None:
    random.seed(1)
    async with replicas(tmp_path, 3) as (teachers, proxies):
        addresses = [f"127.0.0.1:{proxy.port}" for proxy in proxies]
        clients = [await connect(*addresses) for _ in range(2)]
        work = Work(clients, seed=1)
        running = asyncio.create_task(work.run(12))
        started = time.monotonic()

        for _ in range(ROUNDS.server_kills):
            await asyncio.sleep(random.uniform(0.0, 0.06))
            teacher = random.choice(teachers)
            await asyncio.to_thread(teacher.kill)
            await asyncio.sleep(random.choice((0.0, 0.02)))
            teacher.start()
            await teacher.until_ready()
            assert not running.done(), running.result()
        while sum(proxy.num_cut for proxy in proxies) < ROUNDS.connection_cuts:
            await asyncio.sleep(random.uniform(0.0, 0.02))
            random.choice(proxies).cut_all()
            assert not running.done(), running.result()

        work.stop()
        await asyncio.wait_for(running, LIMIT_S)
        num_cuts = sum(proxy.num_cut for proxy in proxies)
        for client in clients:
            await client.aclose()
        log.info(
            "%d servers killed and %d connections reset in %.0f s under %d responses of %d tokens",
            ROUNDS.server_kills,
            num_cuts,
            time.monotonic() - started,
            work.num_responses,
            work.num_tokens,
        )
        # The kills fell on work: there was more of it than one response a kill could hide.
        assert work.num_responses > ROUNDS.server_kills


def score_until_killed(address: str, seed: int, begun: Connection) -> None:
    """A client process: six sessions that never end."""
    rng = np.random.default_rng(seed)

    async def one(client: TeacherClient) -> None:
        span = random_span(rng, 2000)
        session = client.open(PROMPT, OPTIONS, POLICY)
        while True:
            start = session.num_scored % 1900
            await session.append(cut(span, start, start + 16))
            if start == 0:
                begun.send_bytes(b".")

    async def run() -> None:
        client = await connect(address)
        await asyncio.gather(*(one(client) for _ in range(6)))

    asyncio.run(run())


async def kill_a_client(teacher: ForkedTeacher, *, look: bool) -> None:
    """Starts a client process and kills it in the middle of its appends."""
    ours, theirs = multiprocessing.Pipe()
    seed = random.getrandbits(32)
    with forked(score_until_killed, teacher.address, seed, theirs) as process:
        await eventually(lambda: ours.poll() or not process.is_alive())
        assert ours.poll(), "the client ended by itself"
        await asyncio.sleep(random.uniform(0.0, 0.03))
        if look:
            assert open_sessions(await asyncio.to_thread(teacher.metrics)) >= 1
    ours.close()
    theirs.close()


def open_sessions(metrics: str) -> int:
    """The gauge of sessions, added up over its labels."""
    values = re.findall(r"^teacher_sessions\S* (\S+)$", metrics, re.MULTILINE)
    assert values, metrics
    return int(sum(float(value) for value in values))


async def until_no_session_is_left(teacher: ForkedTeacher) -> None:
    """Long before the ten minutes that an orderly client's idle session is kept."""
    async with asyncio.timeout(LIMIT_S):
        while open_sessions(await asyncio.to_thread(teacher.metrics)):
            await asyncio.sleep(0.05)


async def warm_up(teacher: ForkedTeacher) -> None:
    """Clients of this process that vanish in the same way, which is cheaper."""
    span = random_span(np.random.default_rng(0), 200)
    async with cut_proxy(teacher.port) as proxy:
        for _ in range(ROUNDS.clients_before):
            client = await connect(f"127.0.0.1:{proxy.port}")
            asking = [asyncio.create_task(score_in_pieces(client, span)) for _ in range(6)]
            await asyncio.sleep(random.uniform(0.002, 0.012))
            assert proxy.cut_all() == 1
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await client.aclose()


@pytest.mark.timeout(ROUNDS.timeout_s)
async def test_killed_clients_leave_neither_sessions_nor_memory(tmp_path: Path) -> None:
    random.seed(2)
    teacher = ForkedTeacher(tmp_path, **SETTINGS)
    teacher.start()
    try:
        await teacher.until_ready()
        await warm_up(teacher)
        await until_no_session_is_left(teacher)
        before = teacher.resident_bytes()
        started = time.monotonic()
        for number in range(0, ROUNDS.client_kills, 2):
            look = number % 20 == 0
            await asyncio.gather(*(kill_a_client(teacher, look=look) for _ in range(2)))
            if number % 20 == 18:
                await until_no_session_is_left(teacher)
        await until_no_session_is_left(teacher)
        growth = teacher.resident_bytes() - before
        log.info(
            "%d clients killed in %.0f s: memory of the server %+d bytes, %+.0f a kill",
            ROUNDS.client_kills,
            time.monotonic() - started,
            growth,
            growth / ROUNDS.client_kills,
        )
        assert growth <= MAX_GROWTH_PER_KILL * ROUNDS.client_kills + ROUNDS.memory_slack_bytes
    finally:
        teacher.kill()
