"""Thousands of sessions that do nothing cost little, and leave nothing when they go.

Run: pytest tests/faults/test_idle_sessions.py
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from tests.faults.live_server import LiveServer, live_server
from tests.faults.loads import Tally, ask_without_pause, tenant
from tests.teacher.rpc.raw_streams import Raw
from tests.teacher.scoring.fake_rows import make_span

NUM_CHANNELS, PER_CHANNEL, NUM_ACTIVE = 20, 100, 100
IDLE_BYTES = 100 << 10


async def active(teacher: LiveServer, seconds: float) -> Tally:
    """A hundred sessions at work, at a pace that leaves the machine some time."""
    tally = Tally()
    async with tenant(teacher.address, "active") as client:
        await ask_without_pause(
            client, tally, sessions=NUM_ACTIVE, append_tokens=16, seconds=seconds
        )
    return tally


async def cpu_share(teacher: LiveServer, seconds: float) -> float:
    """CPU time of the server over real time, while nobody asks."""
    before = teacher.cpu_s()
    await asyncio.sleep(seconds)
    return (teacher.cpu_s() - before) / seconds


async def idle_channel(stack: AsyncExitStack, address: str) -> Raw:
    """One channel with one stream and its sessions, each of which has been scored once."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
    stub: Any = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
    raw = Raw(stub)
    await raw.send(hello=pb.Hello(protocol_version=1, run_id="idle"))
    for index in range(PER_CHANNEL):
        await raw.open(str(index), policy=None)
        await raw.append(make_span(4), str(index))
    answered = 0
    while answered < PER_CHANNEL:
        answered += (await raw.receive()).scores.last
    return raw


@pytest.mark.e2e
def test_2000_idle_sessions_beside_100_active_ones_then_all_leave_at_once(tmp_path: Path) -> None:
    async def scenario(teacher: LiveServer) -> None:
        before = await active(teacher, 3.0)
        started_with = teacher.rss_bytes()
        async with AsyncExitStack() as stack:
            idle = [await idle_channel(stack, teacher.address) for _ in range(NUM_CHANNELS)]
            per_session = (teacher.rss_bytes() - started_with) / (NUM_CHANNELS * PER_CHANNEL)
            idle_share = await cpu_share(teacher, 3.0)
            beside = await active(teacher, 3.0)
            for raw in idle:
                raw.call.cancel()  # all at once, and none says goodbye
        give_up = time.monotonic() + 10
        while (after := teacher.rss_bytes()) > 1.2 * started_with and time.monotonic() < give_up:
            await asyncio.sleep(0.2)
        slower = statistics.median(beside.seconds) / statistics.median(before.seconds)
        p99 = beside.p99 / before.p99
        print(  # noqa: T201
            f"{per_session / 1024:.1f} KiB an idle session, {idle_share:.1%} of a core, active p50 "
            f"x {slower:.2f}, p99 x {p99:.2f}, RSS afterwards x {after / started_with:.3f}"
        )
        assert per_session <= IDLE_BYTES
        assert idle_share < 0.05
        assert slower <= 1.5  # measured 0.98 to 1.21 on a busy machine
        assert after <= 1.2 * started_with

    # The engine is the bottleneck, so that the pace does not depend on the machine.
    flags = ("--fake-latency-s", "0.01", "--max-running", "2", "--max-sessions", "4096")
    with live_server(tmp_path, *flags) as teacher:
        asyncio.run(scenario(teacher))
