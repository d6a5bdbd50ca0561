"""A client that does not read costs a bounded amount of memory, nobody else, and is cut off.

Run: pytest tests/faults/test_slow_readers.py
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.rpc.stream import StreamLimits
from teacher_wire import codec
from teacher_wire.errors import SlowConsumerError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import ScoreOptions, TokenSpan
from tests.faults.live_server import LiveServer, live_server
from tests.faults.loads import Race
from tests.faults.scrape import Scrape, until
from tests.teacher.rpc.raw_streams import Raw, raw_stream
from tests.waiting import LIMIT_S, eventually, wait_until

MIB = 1 << 20
SLOW_S = 2.0
SLOW_WATCHED_S = 6.0
"""Long enough to watch the others while one is stuck."""
NUM_SESSIONS = 110
NUM_ANSWERS = 300
"""To others, while one is stuck."""
SPAN = TokenSpan(offset=0, token_ids=np.arange(448, dtype=np.int32))
OPTIONS = codec.encode_options(ScoreOptions(k=128))
"""448 rows of 1 KiB: with NUM_SESSIONS sessions about 50 MB of answers."""


async def beside(teacher: LiveServer) -> int:
    """Eight sessions of somebody else; how many answers they got."""
    race = Race(NUM_ANSWERS)
    await race.run(teacher.address, "others", sessions=8, append_tokens=16)
    return race.num_answered


def cut_off(scrape: Scrape) -> bool:
    """One stream was, because it was not read."""
    return scrape.value("teacher_dropped_total", reason="slow") == 1


async def sample_memory(teacher: LiveServer, samples: list[int]) -> None:
    """Adds to the samples until it is cancelled."""
    while True:
        samples.append(teacher.rss_bytes())
        await asyncio.sleep(0.1)


async def stuck(teacher: LiveServer) -> float:
    """Returns when nothing of the client that does not read is in the engine or waits for it: the
    tokens scored for it. Until then others wait for their turn, as they should."""
    before, made = -1.0, 0.0
    work = ("teacher_queue_depth", "teacher_batch_sessions")
    while made == 0 or made > before:
        await asyncio.sleep(0.3)
        scrape = await until(teacher, lambda scrape: not any(map(scrape.value, work)))
        before, made = made, scrape.value("teacher_tokens_scored_total", tenant="slow")
    return made


@pytest.mark.e2e
@pytest.mark.parametrize("credit_bytes", [0, 64 * MIB, 100_000])
def test_50_mb_for_a_client_that_stops_reading(tmp_path: Path, credit_bytes: int) -> None:
    flags = ("--slow-client-s", str(SLOW_WATCHED_S), "--fake-latency-s", "0.01")
    flags += ("--max-running", "8")

    async def scenario(teacher: LiveServer) -> None:
        await beside(teacher)  # what a process allocates once is there
        before = teacher.rss_bytes()
        samples: list[int] = []
        watcher = asyncio.create_task(sample_memory(teacher, samples))
        async with grpc.aio.insecure_channel(teacher.address) as channel:
            raw = Raw(pb_grpc.TeacherServiceStub(channel))  # type: ignore[no-untyped-call]
            hello = pb.Hello(protocol_version=1, run_id="slow", credit_bytes=credit_bytes)
            await raw.send(hello=hello)
            for index in range(NUM_SESSIONS):
                await raw.open(str(index), policy=None, options=OPTIONS)
                await raw.append(SPAN, str(index))
            made = await stuck(teacher)
            assert await beside(teacher) == NUM_ANSWERS
            scrape = await until(teacher, cut_off)
            error = await raw.failure()
        watcher.cancel()
        growth = max(samples) - before
        print(f"RSS +{growth / MIB:.1f} MiB, {made:.0f} tokens scored")  # noqa: T201
        assert type(error) is SlowConsumerError
        assert made < 0.5 * NUM_SESSIONS * len(SPAN)
        assert scrape.value("teacher_tokens_scored_total", tenant="slow") == made
        assert growth <= 16 * MIB

    with live_server(tmp_path, *flags) as teacher:
        asyncio.run(scenario(teacher))


@pytest.mark.e2e
def test_an_http_client_that_stops_reading_is_cut_off(tmp_path: Path) -> None:
    ids = [1] * 6000
    query = {"prompt_ids": [1], "response_ids": ids, "k": 128, "encoding": "base64"}
    body = json.dumps(query).encode()
    head = "POST /v1/score HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    flags = ("--slow-client-s", str(SLOW_S), "--max-context", "8192")
    with live_server(tmp_path, *flags) as teacher, socket.socket() as client:
        before = teacher.num_fds()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = teacher.http_address.split(":")
        client.connect((host, int(port)))
        client.sendall(head.encode() + body)
        started = time.monotonic()
        wait_until(lambda: cut_off(Scrape(teacher)))
        assert time.monotonic() - started >= 0.9 * SLOW_S
        wait_until(lambda: teacher.num_fds() <= before)
        status, _ = teacher.get("/readyz")
        assert status == 200


async def test_work_for_a_client_that_does_not_read_is_not_begun() -> None:
    """Its answers are bounded while they are made, not only when they wait."""
    engine = FakeEngine()
    limits = StreamLimits(max_reply_bytes=1 << 20)
    hello = pb.Hello(protocol_version=1, credit_bytes=1)
    async with raw_stream(engine, hello=hello, stream_limits=limits) as (raw, _):
        for index in range(20):
            await raw.open(str(index), policy=None, options=OPTIONS)
            await raw.append(SPAN, str(index))
        await eventually(lambda: engine.num_queries >= 2)
        await asyncio.sleep(0.3)
        assert engine.num_queries <= 4  # two in the queue, one with credit, one on its way
        await raw.send(credit=pb.Credit(bytes=1 << 30))
        answered = 0
        while answered < 20:
            answered += (await raw.receive()).scores.last
        assert engine.num_queries == 20


async def test_a_slow_reader_of_one_whole_response_is_cut_off_too() -> None:
    limits, engine = StreamLimits(slow_client_s=0.5), FakeEngine(max_context=20_000)
    ids = np.zeros(16_384, np.int32)
    request = pb.ScoreRequest(
        prompt_ids=codec.encode_ids(ids[:5]),
        span=codec.encode_span(TokenSpan(offset=0, token_ids=ids)),
        options=OPTIONS,
    )
    async with raw_stream(engine, stream_limits=limits) as (_, teacher):
        async with grpc.aio.insecure_channel(teacher.address) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Score(request)
            dropped = 'teacher_dropped_total{reason="slow"} 1.0'
            await eventually(lambda: dropped in teacher.metrics.render().decode())
            num_rows = 0
            # grpc.aio may lose the status that stands behind what was sent, never a row before it.
            with suppress(grpc.aio.AioRpcError):
                async with asyncio.timeout(LIMIT_S):
                    async for reply in call:
                        num_rows += reply.rows.count
            assert 0 < num_rows < len(ids)
