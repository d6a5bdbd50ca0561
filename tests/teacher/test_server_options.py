"""gRPC ignores an option it does not know, so options are tested by their effect.

Run: pytest tests/teacher/test_server_options.py
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest

from student_trainer.teacher_stream import CHANNEL_OPTIONS
from teacher_server.server_options import SERVER_OPTIONS
from teacher_server.service import TeacherService
from teacher_server.testing import local_teacher
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc

PING_INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
MISSPELT = "grpc.http2.min_recv_ping_interval_without_data_ms"


async def idle_stream_survives(options: dict[str, int], service: TeacherService) -> bool:
    """Whether a stream lives through 4 s of idling with a ping a second, gRPC's fastest."""
    server = grpc.aio.server(options=list(options.items()))
    pb_grpc.add_TeacherServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = dict(CHANNEL_OPTIONS) | {"grpc.keepalive_time_ms": 500}
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=list(client.items())
        ) as ch:
            stub: Any = pb_grpc.TeacherServiceStub(ch)  # type: ignore[no-untyped-call]
            call = stub.Session()
            await call.write(pb.SessionRequest(hello=pb.Hello(protocol_version=1)))
            assert (await call.read()).HasField("welcome")
            reading = asyncio.ensure_future(call.read())
            done, _ = await asyncio.wait({reading}, timeout=4)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading
            return not done
    finally:
        await server.stop(None)


@pytest.mark.parametrize(("key", "survives"), [(PING_INTERVAL, True), (MISSPELT, False)])
async def test_idle_clients_may_ping_as_often_as_the_option_says(key: str, survives: bool) -> None:
    options = dict(SERVER_OPTIONS)
    assert options.pop(PING_INTERVAL) <= dict(CHANNEL_OPTIONS)["grpc.keepalive_time_ms"]
    async with local_teacher() as teacher:
        options |= {key: 50, "grpc.http2.max_ping_strikes": 1}
        assert await idle_stream_survives(options, teacher.service) is survives


async def test_two_servers_never_share_a_port() -> None:
    async with local_teacher() as teacher:
        port = int(teacher.address.rsplit(":", 1)[1])
        with pytest.raises(RuntimeError, match="bind"):
            async with local_teacher(port=port):
                pass
