"""A real `teacher-server serve --engine fake` process, from start to end.

Run: pytest tests/teacher/process/test_server_process.py
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_server.testing import local_teacher
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import DriftPolicy, ScoreOptions
from tests.faults.live_server import LiveServer
from tests.faults.scrape import Scrape, until
from tests.teacher.scoring.fake_rows import assert_same_response, cut, make_span
from tests.waiting import LIMIT_S, eventually

pytestmark = pytest.mark.e2e

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.1)


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "teacher_server.cli", *arguments]


class Servers:
    """Starts server processes and ends those it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[LiveServer] = []

    def start(self, *arguments: str, grpc_port: int = 0) -> LiveServer:
        server = LiveServer(self.folder, "--grpc-port", str(grpc_port), *arguments, forked=False)
        self.started.append(server)
        return server


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    running = Servers(tmp_path)
    yield running
    for server in running.started:
        server.end()


def in_hand(scrape: Scrape) -> float:
    """Appends that wait or are computed."""
    return scrape.value("teacher_queue_depth") + scrape.value("teacher_batch_sessions")


def probe(address: str) -> int:
    return subprocess.run(
        cli("probe", "--address", address, "--timeout-s", "30"),
        capture_output=True,
        timeout=LIMIT_S,
    ).returncode


def test_life_of_a_server(servers: Servers) -> None:
    server = servers.start().wait_until_ready()
    assert server.ready["pid"] == server.process.pid
    assert probe(server.address) == 0
    with urllib.request.urlopen(f"http://{server.http_address}/readyz", timeout=LIMIT_S) as reply:
        assert reply.status == 200
    with grpc.insecure_channel(server.address) as channel:
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert {"opd.teacher.v1.TeacherService", "grpc.health.v1.Health"} <= set(services)
    server.send_signal(signal.SIGTERM)
    assert server.exit_code() == 0, server.output
    assert f"teacher-server ready grpc={server.address} http=" in server.output
    assert "Traceback" not in server.output
    assert probe(server.address) == 2


def test_a_taken_port_is_named(servers: Servers) -> None:
    first = servers.start().wait_until_ready()
    second = servers.start(grpc_port=first.port)
    assert second.exit_code() == 2
    assert f"gRPC cannot listen on 127.0.0.1:{first.port}" in second.output
    http_port = first.http_address.rsplit(":", 1)[1]
    third = servers.start("--http-port", http_port)
    assert third.exit_code() == 2
    assert f"HTTP cannot listen on 127.0.0.1:{http_port}" in third.output
    assert "Traceback" not in third.output


def test_health_says_not_serving_while_the_engine_stalls(servers: Servers) -> None:
    server = servers.start("--fake-latency-s", "4", "--no-self-test", "--engine-stall-s", "0.5")
    server.wait_until_ready()
    assert probe(server.address) == 0

    async def stall() -> None:
        client = await connect(server.address)
        asking = asyncio.create_task(client.open(PROMPT, OPTIONS, POLICY).append(make_span(5)))
        with grpc.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            seen = []
            for reply in stub.Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S):
                seen.append(reply.status)
                if len(seen) == 3:
                    break
                await asyncio.sleep(0.1)
        status = health_pb2.HealthCheckResponse
        assert seen == [status.SERVING, status.NOT_SERVING, status.SERVING]
        await asking
        await client.aclose()

    asyncio.run(stall())


def test_sigterm_answers_what_was_asked_and_exits_0(servers: Servers) -> None:
    flags = ("--fake-latency-s", "3", "--no-self-test", "--drain-s", "3600")
    server = servers.start(*flags).wait_until_ready()

    async def under_load() -> None:
        client = await connect(server.address)
        sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in range(50)]
        asking = [asyncio.create_task(session.append(make_span(5))) for session in sessions]
        await until(server, lambda scrape: in_hand(scrape) == len(asking))
        server.send_signal(signal.SIGTERM)
        answers = await asyncio.wait_for(asyncio.gather(*asking), LIMIT_S)
        assert all(len(scores.rows) == 5 for scores in answers)
        assert await asyncio.to_thread(server.exit_code) == 0
        await client.aclose()

    asyncio.run(under_load())


def test_a_second_sigterm_ends_at_once(servers: Servers) -> None:
    server = servers.start("--fake-latency-s", "3600", "--no-self-test", "--drain-s", "3600")
    server.wait_until_ready()

    async def stuck() -> None:
        client = await connect(server.address)
        asking = asyncio.create_task(client.open(PROMPT, OPTIONS, POLICY).append(make_span(5)))
        await until(server, lambda scrape: in_hand(scrape) == 1)
        server.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.0)  # two signals within half a second are one
        assert server.process.poll() is None
        assert await asyncio.to_thread(probe, server.address) == 1
        server.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.exit_code) == 128 + signal.SIGTERM
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await client.aclose()

    asyncio.run(stuck())


def test_kill_9_and_a_restart_change_no_row(servers: Servers) -> None:
    span = make_span(120)
    server = servers.start("--fake-latency-s", "0.1").wait_until_ready()

    async def resume() -> None:
        client = await connect(server.address)
        session = client.open(PROMPT, OPTIONS, POLICY)
        parts = [await session.append(cut(span, 0, 30))]

        async def rest() -> None:
            for start in range(30, 120, 5):
                parts.append(await session.append(cut(span, start, start + 5)))

        running = asyncio.create_task(rest())
        await eventually(lambda: len(parts) > 2)
        server.end()
        assert not running.done()
        again = servers.start("--fake-latency-s", "0.1", grpc_port=server.port)
        await asyncio.to_thread(again.wait_until_ready)
        await asyncio.wait_for(running, LIMIT_S)
        async with local_teacher() as local:
            whole = await local.sessions.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")
        assert_same_response(parts, whole)
        await client.aclose()

    asyncio.run(resume())


async def connect(address: str) -> TeacherClient:
    return await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=512,
        run_id="test",
        connect_timeout_s=LIMIT_S,
        limits=RetryLimits(max_resends=100),
    )
