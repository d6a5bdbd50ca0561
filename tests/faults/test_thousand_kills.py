"""A thousand random kills of servers, connections and clients change, lose and repeat no row.

Servers and clients are real processes and end by SIGKILL; connections are reset in the middle of a
frame. Run: pytest tests/faults/test_thousand_kills.py. With FAULT_PROCESS_KILLS=1000 every one of
a thousand kills is that of a process; that takes minutes and belongs in a soak.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
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
from tests.teacher.scoring.fake_rows import cut

log = logging.getLogger(__name__)
pytestmark = pytest.mark.e2e

PROCESS_KILLS = int(os.environ.get("FAULT_PROCESS_KILLS", "0"))
NUM_SERVER_KILLS = PROCESS_KILLS // 2 or 60
NUM_CUTS = 860
NUM_CLIENT_KILLS = PROCESS_KILLS // 2 or 80
NUM_WARM_UP = 1500 if PROCESS_KILLS else 200
"""Clients that come and go before the server's memory is measured."""
TIMEOUT_S = 180 + 2 * PROCESS_KILLS

SETTINGS = {"fake_vocab_size": VOCAB_SIZE, "max_k": 16, "fake_latency_s": 0.002}
PATIENT = RetryLimits(
    first_backoff_s=0.005, max_backoff_s=0.05, max_resends=10_000, max_reopens=10_000
)
MAX_GROWTH_PER_KILL = 1024
"""Bytes."""
ALLOCATOR_BYTES = 0 if PROCESS_KILLS else 1 << 20
"""After so short a warm-up memory goes up and down by as much."""


async def connect(*addresses: str) -> TeacherClient:
    """A client that never gives up."""
    return await TeacherClient.connect(
        addresses,
        tokenizer_fingerprint="",
        vocab_size=VOCAB_SIZE,
        run_id="kills",
        connect_timeout_s=40.0,
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


@pytest.mark.timeout(TIMEOUT_S)
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

        for _ in range(NUM_SERVER_KILLS):
            await asyncio.sleep(random.uniform(0.0, 0.06))
            teacher = random.choice(teachers)
            await asyncio.to_thread(teacher.kill)
            await asyncio.sleep(random.choice((0.0, 0.02)))
            teacher.start()
            await teacher.until_ready()
            assert not running.done(), running.result()
        while sum(proxy.num_cut for proxy in proxies) < NUM_CUTS:
            await asyncio.sleep(random.uniform(0.0, 0.02))
            random.choice(proxies).cut_all()
            assert not running.done(), running.result()

        work.stop()
        await asyncio.wait_for(running, 30)
        num_cuts = sum(proxy.num_cut for proxy in proxies)
        for client in clients:
            await client.aclose()
        log.info(
            "%d servers killed and %d connections reset in %.0f s under %d responses of %d tokens",
            NUM_SERVER_KILLS,
            num_cuts,
            time.monotonic() - started,
            work.num_responses,
            work.num_tokens,
        )
        # The kills fell on work: there was more of it than one response a kill could hide.
        assert work.num_responses > 100


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
        give_up = time.monotonic() + 20
        while not ours.poll():
            assert process.is_alive(), "the client ended by itself"
            assert time.monotonic() < give_up, "the client has not begun"
            await asyncio.sleep(0.002)
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
    """Within two seconds of the last kill."""
    give_up = time.monotonic() + 2.0
    while open_sessions(await asyncio.to_thread(teacher.metrics)):
        assert time.monotonic() < give_up, "sessions of killed clients are still held"
        await asyncio.sleep(0.05)


async def warm_up(teacher: ForkedTeacher) -> None:
    """Clients of this process that vanish in the same way, which is cheaper."""
    span = random_span(np.random.default_rng(0), 200)
    async with cut_proxy(teacher.port) as proxy:
        for _ in range(NUM_WARM_UP):
            client = await connect(f"127.0.0.1:{proxy.port}")
            asking = [asyncio.create_task(score_in_pieces(client, span)) for _ in range(6)]
            await asyncio.sleep(random.uniform(0.002, 0.012))
            assert proxy.cut_all() == 1
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            await client.aclose()


@pytest.mark.timeout(TIMEOUT_S)
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
        for number in range(0, NUM_CLIENT_KILLS, 2):
            look = number % 20 == 0
            await asyncio.gather(*(kill_a_client(teacher, look=look) for _ in range(2)))
            if number % 20 == 18:
                await until_no_session_is_left(teacher)
        await until_no_session_is_left(teacher)
        growth = teacher.resident_bytes() - before
        log.info(
            "%d clients killed in %.0f s: memory of the server %+d bytes, %+.0f a kill",
            NUM_CLIENT_KILLS,
            time.monotonic() - started,
            growth,
            growth / NUM_CLIENT_KILLS,
        )
        assert growth <= MAX_GROWTH_PER_KILL * NUM_CLIENT_KILLS + ALLOCATOR_BYTES
    finally:
        teacher.kill()
