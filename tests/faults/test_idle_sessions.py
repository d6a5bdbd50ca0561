"""Thousands of sessions that do nothing cost little, and leave nothing when they go.

Run: pytest tests/faults/test_idle_sessions.py
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from tests.faults.live_server import LiveServer, live_server
from tests.faults.loads import Race
from tests.teacher.rpc.raw_streams import Raw
from tests.teacher.scoring.fake_rows import make_span
from tests.waiting import eventually

NUM_CHANNELS, PER_CHANNEL, NUM_ACTIVE = 20, 100, 100
NUM_ANSWERS = 1000
IDLE_BYTES = 100 << 10


async def cpu_of_active(teacher: LiveServer) -> float:
    """CPU time of the server for the answers to a hundred sessions at work, s."""
    before = teacher.cpu_s()
    await Race(NUM_ANSWERS).run(teacher.address, "active", sessions=NUM_ACTIVE, append_tokens=16)
    return teacher.cpu_s() - before


async def cpu_share(teacher: LiveServer) -> float:
    """CPU time of the server over real time, while nobody asks."""
    before, started = teacher.cpu_s(), time.monotonic()
    await asyncio.sleep(2.0)
    return (teacher.cpu_s() - before) / (time.monotonic() - started)


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
        await cpu_of_active(teacher)  # what a process allocates once is there after it
        before = await cpu_of_active(teacher)
        started_with = teacher.rss_bytes()
        async with AsyncExitStack() as stack:
            idle = [await idle_channel(stack, teacher.address) for _ in range(NUM_CHANNELS)]
            per_session = (teacher.rss_bytes() - started_with) / (NUM_CHANNELS * PER_CHANNEL)
            idle_share = await cpu_share(teacher)
            beside = await cpu_of_active(teacher)
            for raw in idle:
                raw.call.cancel()  # all at once, and none says goodbye
        print(  # noqa: T201
            f"{per_session / 1024:.1f} KiB an idle session, {idle_share:.1%} of a core, CPU time "
            f"of active ones x {beside / before:.2f}"
        )
        assert per_session <= IDLE_BYTES
        assert idle_share < 0.05
        assert beside <= 1.5 * before
        await eventually(lambda: teacher.rss_bytes() <= 1.2 * started_with)

    with live_server(tmp_path, "--max-sessions", "4096") as teacher:
        asyncio.run(scenario(teacher))
