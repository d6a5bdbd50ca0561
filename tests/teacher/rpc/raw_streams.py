"""A Session stream spoken to message by message, over a real loopback socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import numpy as np

from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import LocalTeacher, local_teacher
from teacher_wire import codec
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import DriftPolicy, ScoreOptions, TokenSpan
from teacher_wire.status import decode_status
from tests.waiting import eventually as eventually

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.1)
HELLO = pb.Hello(protocol_version=1, run_id="test")


class Raw:
    """A stream without any help: one message out, one message in."""

    def __init__(self, stub: Any, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        self.call = stub.Session(metadata=metadata)

    async def send(self, **message: Any) -> None:
        # A server that has refused the stream already fails the write; the read tells why.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await self.call.write(pb.SessionRequest(**message))

    async def receive(self) -> pb.SessionResponse:
        message = await self.call.read()
        assert message is not grpc.aio.EOF, "the server ended the stream"
        return message

    async def open(self, name: str = "s", **changes: Any) -> None:
        fields: dict[str, Any] = {
            "prompt_ids": codec.encode_ids(PROMPT),
            "options": codec.encode_options(OPTIONS),
            "policy": codec.encode_policy(POLICY),
        }
        await self.send(open=pb.Open(session_id=name, **(fields | changes)))

    async def append(self, span: TokenSpan, name: str = "s", deadline_ms: int = 0) -> None:
        message = pb.Append(session_id=name, span=codec.encode_span(span), deadline_ms=deadline_ms)
        await self.send(append=message)

    async def failure(self) -> TeacherError:
        """The error that ends the stream."""
        try:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return decode_status(error)
        raise AssertionError("the stream ended without an error")


@asynccontextmanager
async def stub_of(teacher: LocalTeacher) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(teacher.address, options=codec.CHANNEL_LIMITS) as channel:
        yield pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def raw_stream(
    engine: FakeEngine | None = None, *, hello: pb.Hello = HELLO, **limits: Any
) -> AsyncIterator[tuple[Raw, LocalTeacher]]:
    async with local_teacher(engine, **limits) as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(hello=hello)
        assert (await raw.receive()).HasField("welcome")
        yield raw, teacher
        raw.call.cancel()
