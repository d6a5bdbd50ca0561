"""Whatever the network is like, the scores are the same, and nothing stands still.

Run: pytest tests/faults/test_network_weather.py
"""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_server.rpc.server_options import SERVER_OPTIONS
from teacher_server.testing import local_teacher
from teacher_wire import codec
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import DriftPolicy, ScoreOptions, Scores, TokenSpan
from tests.faults.proxy import Proxy, Weather, reset, weather
from tests.teacher.rpc.raw_streams import HELLO, Raw
from tests.teacher.rpc.raw_streams import OPTIONS as RAW_OPTIONS
from tests.teacher.rpc.raw_streams import POLICY as RAW_POLICY
from tests.teacher.scoring.fake_rows import assert_same_response, cut, make_span
from tests.waiting import LIMIT_S, eventually

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=32)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.1)
NUM_SESSIONS, TOKENS, PIECE = 6, 96, 16


async def rollout(client: TeacherClient, span: TokenSpan) -> list[Scores]:
    session = client.open(PROMPT, OPTIONS, POLICY)
    parts = [
        await session.append(cut(span, start, start + PIECE)) for start in range(0, TOKENS, PIECE)
    ]
    await session.close()
    return parts


async def scored_through(
    conditions: Weather, *, credit_bytes: int = 32 << 20, cuts: int = 0
) -> tuple[Proxy, float]:
    """Scores several rollouts through the proxy and compares every row with the plain ones."""
    spans = [make_span(TOKENS, seed=seed) for seed in range(NUM_SESSIONS)]
    async with local_teacher() as teacher, weather(teacher.address, conditions) as proxy:
        client = await TeacherClient.connect(
            [proxy.address],
            tokenizer_fingerprint="",
            vocab_size=512,
            run_id="far",
            credit_bytes=credit_bytes,
            limits=RetryLimits(max_resends=100),
        )
        started = time.monotonic()
        rollouts = asyncio.gather(*(rollout(client, span) for span in spans))
        for _ in range(cuts):
            before = proxy.num_bytes
            while proxy.num_bytes < before + 8_000 and not rollouts.done():
                await asyncio.sleep(0.005)
            proxy.cut()
        answers = await asyncio.wait_for(rollouts, LIMIT_S)
        took_s = time.monotonic() - started
        for span, parts in zip(spans, answers, strict=True):
            whole = await teacher.sessions.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")
            assert_same_response(parts, whole)
        await client.aclose()
    return proxy, took_s


async def test_latency_of_100_ms() -> None:
    _, took_s = await scored_through(Weather(latency_s=0.1))
    # Each append waits for one way there and one back, and so does the Close.
    assert took_s >= (TOKENS / PIECE) * 0.2


async def test_one_megabit_a_second_bounds_the_throughput() -> None:
    link = 125_000
    proxy, took_s = await scored_through(Weather(bytes_per_s=link))
    # Both directions have the link to themselves; the larger part of the bytes are answers.
    assert proxy.num_bytes / 2 / took_s <= 1.1 * link


@pytest.mark.parametrize(("slice_bytes", "pause_s"), [(7, 0.0), (1000, 0.0005)])
async def test_slices(slice_bytes: int, pause_s: float) -> None:
    await scored_through(Weather(slice_bytes=slice_bytes, slice_pause_s=pause_s))


async def test_a_narrow_link_with_little_credit_does_not_deadlock() -> None:
    await scored_through(Weather(bytes_per_s=250_000, latency_s=0.01), credit_bytes=4000)


async def test_connections_that_are_reset_again_and_again() -> None:
    proxy, _ = await scored_through(Weather(latency_s=0.005), cuts=6)
    assert proxy.num_connections > 3


async def test_a_connection_that_one_end_has_left_can_be_cut() -> None:
    async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(stay, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with weather(f"127.0.0.1:{port}", Weather()) as proxy:
            _, writer = await asyncio.open_connection(*proxy.address.split(":"))
            writer.write(b"x")
            await eventually(lambda: proxy.num_bytes)
            reset(writer)
            await asyncio.sleep(0.1)
            proxy.cut()


async def test_a_connection_that_falls_silent_is_ended_and_its_session_waits() -> None:
    """Half-open: neither end closes, nothing arrives any more. Pings every second, not every 30."""
    options = dict(SERVER_OPTIONS) | {
        "grpc.keepalive_time_ms": 1000,
        "grpc.http2.ping_timeout_ms": 500,
    }
    async with (
        local_teacher(options=list(options.items())) as teacher,
        weather(teacher.address, Weather()) as proxy,
        grpc.aio.insecure_channel(proxy.address) as far,
        grpc.aio.insecure_channel(teacher.address) as near,
    ):
        span = make_span(12)
        lost, back = (
            Raw(pb_grpc.TeacherServiceStub(channel))  # type: ignore[no-untyped-call]
            for channel in (far, near)
        )
        for raw in (lost, back):
            await raw.send(hello=HELLO)
            await raw.receive()
        await lost.open("s")
        await lost.append(cut(span, 0, 5), "s")
        assert [(await lost.receive()).WhichOneof("message") for _ in range(2)][-1] == "scores"
        proxy.silent = True
        ended = "grpc_server_handled_total{"
        await eventually(lambda: ended in teacher.metrics.render().decode())
        assert f'{ended}grpc_code="CANCELLED"' in teacher.metrics.render().decode()
        assert len(teacher.sessions) == 1
        await back.append(cut(span, 5, 12), "s")
        reply = await back.receive()
        assert reply.scores.rows.count == 7
        whole = await teacher.sessions.score_once(PROMPT, span, RAW_OPTIONS, RAW_POLICY, tenant="t")
        got = codec.decode_scores([reply.scores])
        np.testing.assert_array_equal(got.rows.topk_ids, whole.rows.topk_ids[5:])
        back.call.cancel()
