"""A server tells the truth of itself from start to end, and ends as it should.

Rows 5, 15 and 17 of the fault table. Run: pytest tests/faults/test_lifecycle.py
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.process.lifecycle import Lifecycle, Phase
from teacher_server.process.watchdog import _PROBE, WatchedEngine
from teacher_server.rpc.health import Health
from teacher_wire.errors import NotReadyError
from teacher_wire.status import decode_status
from tests.faults.live_server import BROKEN, CLI, LiveServer, gone, live_server
from tests.faults.scrape import Scrape, until
from tests.faults.streams import (
    SERVICE,
    BusyStream,
    HealthLog,
    append_message,
    hello,
    open_message,
    span_at,
    stub_at,
)
from tests.waiting import LIMIT_S, eventually, wait_until

pytestmark = pytest.mark.e2e

SERVING, NOT_SERVING = 1, 2
NUM_STREAMS, SESSIONS_A_STREAM = 4, 25
NEVER_S = "3600"
"""What ends before this limit has not waited for it."""
NEVER_STALLED = ("--engine-stall-s", "3000", "--engine-lost-s", NEVER_S)


async def busy_streams(server: LiveServer, stack: list[Any]) -> list[BusyStream]:
    """100 sessions at work, on four connections."""
    streams = [BusyStream(SESSIONS_A_STREAM) for _ in range(NUM_STREAMS)]

    async def work(stream: BusyStream) -> None:
        async with stub_at(server.address) as stub:
            await stream.run(stub)

    stack += [asyncio.create_task(work(stream)) for stream in streams]
    for stream in streams:
        await asyncio.wait_for(stream.welcomed.wait(), LIMIT_S)
    return streams


async def held(server: LiveServer, gate: Path) -> None:
    """Returns when the engine answers nobody and every session waits for it."""
    gate.touch()

    def all_wait(scrape: Scrape) -> bool:
        waiting = ("teacher_queue_depth", "teacher_batch_sessions")
        return sum(map(scrape.value, waiting)) == NUM_STREAMS * SESSIONS_A_STREAM

    await until(server, all_wait)
    await until(server, all_wait)  # what was past the gate has been answered and has come again


def test_sigterm_under_100_active_sessions(tmp_path: Path) -> None:
    """Everybody is told while nothing is answered, and everything is answered all the same."""
    gate = tmp_path / "gate"
    flags = (*NEVER_STALLED, "--drain-s", NEVER_S)
    with live_server(tmp_path, *flags, program=(*BROKEN, f"gate={gate}")) as server:

        async def scenario() -> None:
            tasks: list[Any] = []
            health = HealthLog()
            watching = asyncio.create_task(health.follow(server.address))
            streams = await busy_streams(server, tasks)
            await health.until([SERVING])
            await held(server, gate)
            answered = [stream.answered for stream in streams]
            server.process.send_signal(signal.SIGTERM)
            await health.until([SERVING, NOT_SERVING])
            await eventually(lambda: all(stream.went_away_at for stream in streams))
            assert [stream.answered for stream in streams] == answered
            gate.unlink()
            await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
            for stream in streams:
                assert stream.ended_with is None
                assert stream.refused == 0
                assert stream.answered == stream.sent > SESSIONS_A_STREAM
            assert await asyncio.to_thread(server.exit_code) == 0
            await watching

        asyncio.run(scenario())
        assert "Traceback" not in server.output


def test_what_is_not_answered_when_the_drain_ends_is_refused_in_so_many_words(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    flags = (*NEVER_STALLED, "--drain-s", "1", "--max-running", "25")
    with live_server(tmp_path, *flags, program=(*BROKEN, f"gate={gate}")) as server:

        async def scenario() -> None:
            tasks: list[Any] = []
            streams = await busy_streams(server, tasks)
            await held(server, gate)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
            assert await asyncio.to_thread(server.exit_code) == 0
            for stream in streams:
                assert stream.answered == stream.sent - SESSIONS_A_STREAM
                assert isinstance(stream.ended_with, NotReadyError), stream.ended_with
                assert "before it had answered" in stream.ended_with.message

        asyncio.run(scenario())


def test_score_is_refused_in_so_many_words_too(tmp_path: Path) -> None:
    arguments = ("--fake-latency-s", NEVER_S, "--drain-s", "0.5", "--no-self-test")
    with live_server(tmp_path, *arguments) as server:

        async def scenario() -> None:
            async with stub_at(server.address) as stub:
                call = stub.Score(score_request())
                await until(server, lambda scrape: scrape.value("teacher_batch_sessions") == 1)
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert isinstance(decode_status(caught.value), NotReadyError)

        asyncio.run(scenario())
        assert server.exit_code() == 0


def score_request() -> Any:
    from teacher_wire.pb import teacher_pb2 as pb

    opened = open_message("s").open
    span = append_message("s", span_at(0, 3)).append.span
    return pb.ScoreRequest(prompt_ids=opened.prompt_ids, span=span, options=opened.options)


def test_a_client_that_never_says_hello_does_not_hold_the_drain(tmp_path: Path) -> None:
    with live_server(tmp_path, "--drain-s", NEVER_S) as server:

        async def scenario() -> None:
            async with stub_at(server.address) as stub:
                call = stub.Session()
                await asyncio.wait_for(call.wait_for_connection(), LIMIT_S)
                server.process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(server.exit_code) == 0
                call.cancel()

        asyncio.run(scenario())


def test_a_second_sigterm_ends_at_once_and_takes_the_engine_along(tmp_path: Path) -> None:
    with live_server(tmp_path, program=(*BROKEN, "close")) as server:
        child = int(server.output.split("child ")[1].split()[0])
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "closing" in server.output)
        time.sleep(1.0)  # two signals within half a second are one
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 128 + signal.SIGTERM, "it waited for the engine"
        wait_until(lambda: gone(child))


def test_an_engine_that_never_ends_does_not_hold_the_server(tmp_path: Path) -> None:
    with live_server(tmp_path, program=(*BROKEN, "close")) as server:
        child = int(server.output.split("child ")[1].split()[0])
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        wait_until(lambda: gone(child))


def test_sigterm_while_the_engine_starts(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, program=(*BROKEN, "start"))
    try:
        wait_until(lambda: "starting" in server.output)
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert not server.ready_file.exists()
    finally:
        server.end()


def test_an_engine_that_fails_its_self_test_is_never_served(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, program=(*BROKEN, "scores"))
    try:
        assert server.exit_code() == 1
        assert "self-test of fake" in server.output
        assert not server.ready_file.exists()
    finally:
        server.end()


def test_an_engine_that_dies_ends_the_server_with_1(tmp_path: Path) -> None:
    death = tmp_path / "death"
    with live_server(tmp_path, "--drain-s", NEVER_S, program=(*BROKEN, f"dead={death}")) as server:
        death.touch()
        assert server.exit_code() == 1
        last = server.output.splitlines()[-1]
        assert last.endswith("ends with exit code 1: the engine says that it cannot score any more")


def test_a_hung_engine_is_not_serving_and_recovers(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    arguments = ("--engine-stall-s", "1", "--engine-lost-s", "60")
    with live_server(tmp_path, *arguments, program=(*BROKEN, f"gate={gate}")) as server:

        async def scenario() -> None:
            logs = [HealthLog(), HealthLog("")]
            watching = [asyncio.create_task(log.follow(server.address)) for log in logs]
            for log in logs:
                await log.until([SERVING])
            gate.touch()
            hung = time.monotonic()
            async with stub_at(server.address) as stub:
                call = stub.Session()
                for message in (hello(), open_message("s"), append_message("s", span_at(0, 3))):
                    await call.write(message)
                for log in logs:
                    assert await log.until([SERVING, NOT_SERVING]) - hung > 1.0
                assert server.get("/healthz")[0] == 200
                assert server.get("/readyz")[0] == 503
                gate.unlink()
                for log in logs:
                    await log.until([SERVING, NOT_SERVING, SERVING])
                kinds = [(await call.read()).WhichOneof("message") for _ in range(3)]
                assert kinds == ["welcome", "opened", "scores"]
                assert server.get("/readyz")[0] == 200
                call.cancel()
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

        asyncio.run(scenario())


def test_a_stalled_server_whose_clients_have_left_finds_out_by_itself(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    arguments = ("--engine-stall-s", "0.6", "--engine-lost-s", "60")
    with live_server(tmp_path, *arguments, program=(*BROKEN, f"gate={gate}")) as server:

        async def scenario() -> None:
            health = HealthLog()
            watching = asyncio.create_task(health.follow(server.address))
            gate.touch()
            async with stub_at(server.address) as stub:
                for _ in range(4):  # each gives up before the limit: their silence adds up
                    call = stub.Score(score_request(), timeout=0.3)
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call.read()
            await health.until([SERVING, NOT_SERVING])
            await asyncio.sleep(1.0)
            assert health.statuses == [SERVING, NOT_SERVING]
            gate.unlink()
            await health.until([SERVING, NOT_SERVING, SERVING])
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

        asyncio.run(scenario())


def test_an_engine_hung_beyond_the_second_limit_ends_the_server_with_1(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    arguments = ("--engine-stall-s", "0.5", "--engine-lost-s", "1.5", "--drain-s", NEVER_S)
    with live_server(tmp_path, *arguments, program=(*BROKEN, f"gate={gate}")) as server:
        gate.touch()

        async def scenario() -> None:
            stream = BusyStream(3)
            async with stub_at(server.address) as stub:
                started = time.monotonic()
                await asyncio.wait_for(stream.run(stub), LIMIT_S)
            assert stream.went_away_at > started + 1.5
            assert isinstance(stream.ended_with, NotReadyError)

        asyncio.run(scenario())
        assert server.exit_code() == 1
        assert "silent for" in server.output


BAD_SETTINGS = {
    "--max-k 0": "max_k is 0, must be at least 1",
    "--engine-stall-s 9 --engine-lost-s 9": "engine_lost_s is 9.0, must be more than engine_stall",
    "--grpc-port 50051 --http-port 50051": "http_port is 50051, which is grpc_port",
    "--host 0.0.0.0": "host is '0.0.0.0'",
    "--drain-s soon": "drain_s is 'soon', must be of type float",
    "--config no-such-file.toml": "config file no-such-file.toml",
}


@pytest.mark.parametrize("arguments", BAD_SETTINGS)
def test_a_bad_setting_is_refused_by_name(arguments: str) -> None:
    command = [sys.executable, "-m", *CLI, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert BAD_SETTINGS[arguments] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("kind", "flag"), [("gRPC", "--grpc-port"), ("HTTP", "--http-port")])
def test_a_port_in_use_is_named(kind: str, flag: str, tmp_path: Path) -> None:
    with live_server(tmp_path) as first:
        taken = first.address if kind == "gRPC" else first.http_address
        second = LiveServer(tmp_path, flag, taken.rsplit(":", 1)[1])
        try:
            assert second.exit_code() == 2
            assert f"{kind} cannot listen on {taken}" in second.output
            assert "Traceback" not in second.output
        finally:
            second.end()
        assert first.get("/readyz")[0] == 200


async def test_a_port_is_taken_from_the_first_moment() -> None:
    """Two servers that start together must not both believe that they have it."""
    from teacher_server.access.auth import Access
    from teacher_server.process.app import StartError, TeacherApp
    from teacher_server.process.loading import describe
    from teacher_server.settings import TeacherConfig

    def app(config: TeacherConfig) -> TeacherApp:
        engine = FakeEngine()
        info = describe(config, engine, None)
        return TeacherApp(config, engine, info, None, Access.from_config(config))

    config = TeacherConfig(engine="fake", http_port=0)
    listener = app(config)._bind_http()
    with listener:
        port = listener.getsockname()[1]
        other = TeacherConfig(engine="fake", http_port=port)
        with pytest.raises(StartError, match=f":{port}"):
            app(other)._bind_http()


class _Stuck(FakeEngine):
    """Answers a query when its event is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: list[asyncio.Event] = []

    async def score(self, query: ScoreQuery) -> EngineRows:
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        return await super().score(query)


async def test_silence_is_measured_from_the_last_answer() -> None:
    now = 100.0
    engine = _Stuck()
    watched = WatchedEngine(engine, clock=lambda: now)
    assert watched.silent_s() == 0.0
    first, second = (asyncio.create_task(watched.score(_PROBE)) for _ in range(2))
    await asyncio.sleep(0)
    assert (watched.num_running, watched.running_tokens) == (2, 2)
    now += 20
    assert watched.silent_s() == 20
    engine.gates[1].set()
    await second
    assert watched.silent_s() == 0.0, "one query that takes long is no silence of the engine"
    now += 7
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert watched.num_running == 0
    now += 1000
    assert watched.silent_s() == 7, "time with nothing to answer does not count"
    third = asyncio.create_task(watched.score(_PROBE))
    await asyncio.sleep(0)
    now += 3
    assert watched.silent_s() == 10, "the silence of those who gave up adds up"
    engine.gates[-1].set()
    await third
    assert watched.silent_s() == 0.0


class _Context:
    """A watcher of health that reads, or does not."""

    def __init__(self, *, reads: bool = True) -> None:
        self.told: list[int] = []
        self._reads = reads

    async def write(self, reply: Any) -> None:
        self.told.append(reply.status)
        if not self._reads:
            await asyncio.Event().wait()


async def test_a_watcher_that_does_not_read_keeps_nothing_from_the_others() -> None:
    health = Health(["", SERVICE])
    deaf, listening = _Context(reads=False), _Context()
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    watching = [asyncio.create_task(health.Watch(request, c)) for c in (deaf, listening)]
    await eventually(lambda: (listening.told, deaf.told) == ([NOT_SERVING], [NOT_SERVING]))
    told = 1
    for serving in (True, True, False):
        health.set(serving)
        told += listening.told[-1] != (SERVING if serving else NOT_SERVING)
        await eventually(lambda told=told: len(listening.told) == told)
    assert listening.told == [NOT_SERVING, SERVING, NOT_SERVING]
    assert deaf.told == [NOT_SERVING]
    for task in watching:
        task.cancel()
    await asyncio.gather(*watching, return_exceptions=True)


def test_health_knows_its_services_and_no_others(tmp_path: Path) -> None:
    with live_server(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        listed = stub.List(health_pb2.HealthListRequest()).statuses
        assert {name: reply.status for name, reply in listed.items()} == {"": 1, SERVICE: 1}
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        unknown.cancel()


async def test_no_phase_follows_a_final_one() -> None:
    told: list[bool] = []
    life = Lifecycle(told.append)
    for phase in (Phase.SERVING, Phase.STALLED, Phase.SERVING, Phase.DRAINING, Phase.SERVING):
        life.enter(phase)
    life.lose("too late")
    assert told == [True, False, True, False]
    assert life.phase is Phase.DRAINING
    assert life.exit_code == 0
    assert life.ending.is_set()
