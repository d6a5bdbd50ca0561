"""Every error class leaves a server under one code and reason, and arrives as itself.

A class is provoked where a client can provoke it, on a server over real sockets; each has a row
here, and a class without one fails. Run: pytest tests/faults/test_error_table.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import uvicorn
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc.aio import AioRpcError, Metadata

from teacher_server.access.tenants import Tenant
from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.rpc.stream import StreamLimits
from teacher_server.testing import LocalTeacher, local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.errors import (
    ERROR_CODES,
    CapacityError,
    DeadlineError,
    EngineError,
    FingerprintMismatchError,
    InvalidRequestError,
    MessageTooLargeError,
    NonFiniteError,
    NotReadyError,
    PermissionDeniedError,
    QuotaError,
    RateLimitedError,
    SessionNotFoundError,
    SessionOffsetError,
    SlowConsumerError,
    TeacherError,
    UnauthenticatedError,
    error_from_json,
    error_to_json,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import TokenSpan
from teacher_wire.status import decode_error, decode_status, encode_error, encode_status
from tests.teacher.rpc.raw_streams import HELLO, PROMPT, Raw, eventually, raw_stream, stub_of
from tests.teacher.scoring.fake_rows import make_span
from tests.waiting import LIMIT_S

IDS = np.arange(8, dtype=np.int32)
SPAN = TokenSpan(offset=0, token_ids=IDS)


class EveryTenant:
    """All tenants alike."""

    def __init__(self, **limits: int) -> None:
        self._limits = limits

    def get(self, name: str) -> Tenant:
        return Tenant(name=name, **self._limits)


async def in_band(raw: Raw) -> TeacherError:
    while True:
        reply = await raw.receive()
        if reply.HasField("error"):
            return decode_error(reply.error)


async def after_append(
    span: TokenSpan = SPAN, fault: Fault | None = None, **setup: Any
) -> TeacherError:
    """The error of a stream's first append, or of its second."""
    engine = FakeEngine()
    async with raw_stream(engine, **setup) as (raw, _):
        await raw.open(policy=None)
        if fault is not None:
            engine.inject(fault)
        await raw.append(span)
        if fault is None and span is SPAN:
            await raw.append(TokenSpan(offset=8, token_ids=IDS))
        return await in_band(raw)


async def invalid() -> TeacherError:
    return await after_append(TokenSpan(offset=0, token_ids=np.array([512], np.int32)))


async def offset_gap() -> TeacherError:
    error = await after_append(TokenSpan(offset=3, token_ids=IDS))
    assert (error.expected_offset, error.offset) == (0, 3)
    return error


async def other_tokens() -> TeacherError:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(hello=pb.Hello(protocol_version=1, vocab_size=7))
        return await raw.failure()


async def no_session() -> TeacherError:
    async with raw_stream() as (raw, _):
        await raw.append(SPAN, "nowhere")
        return await in_band(raw)


async def overloaded() -> TeacherError:
    engine = FakeEngine()
    async with raw_stream(engine, info=teacher_info(engine, max_sessions=1), evict_idle_s=60.0) as (
        raw,
        _,
    ):
        await raw.open("1")
        await raw.open("2")
        return await in_band(raw)


async def rate_limited() -> TeacherError:
    return await after_append(tenants=EveryTenant(tokens_per_minute=10))


async def over_quota() -> TeacherError:
    async with raw_stream(tenants=EveryTenant(max_sessions=1), evict_idle_s=60.0) as (raw, _):
        await raw.open("1")
        await raw.open("2")
        return await in_band(raw)


async def slow_consumer() -> TeacherError:
    hello = pb.Hello(protocol_version=1, credit_bytes=1)
    async with raw_stream(hello=hello, stream_limits=StreamLimits(slow_client_s=0.2)) as (raw, _):
        await raw.open()
        for start in (0, 8):
            await raw.append(make_span(8, offset=start))
        return await raw.failure()


async def too_large() -> TeacherError:
    request = pb.ScoreRequest(prompt_ids=bytes(codec.MAX_MESSAGE_BYTES))
    async with local_teacher() as teacher:
        unbounded = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(teacher.address, options=unbounded) as channel:
            return await failed(channel.unary_stream(SCORE, pb.ScoreRequest.SerializeToString))(
                request
            )


async def not_ready() -> TeacherError:
    async with local_teacher(ready=lambda: False) as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(hello=HELLO)
        return await raw.failure()


async def too_late() -> TeacherError:
    engine = FakeEngine()
    async with raw_stream(engine, scheduler_limits=SchedulerLimits(max_running=1)) as (raw, _):
        await raw.open("stuck")
        await raw.open("late")
        engine.inject(Fault.HANG)
        await raw.append(make_span(5), "stuck")
        await eventually(lambda: engine.num_queries == 1)
        await raw.append(make_span(5), "late", deadline_ms=20)
        return await in_band(raw)


SCORE = "/opd.teacher.v1.TeacherService/Score"


def failed(call: Any) -> Callable[[Any], Awaitable[TeacherError]]:
    async def run(request: Any) -> TeacherError:
        try:
            async for _ in call(request, timeout=LIMIT_S):
                pass
        except AioRpcError as error:
            return decode_status(error)
        raise AssertionError("the call did not fail")

    return run


Provocation = Callable[[], Awaitable[TeacherError]]
PROVOKED: dict[type[TeacherError], Provocation | None] = {
    InvalidRequestError: invalid,
    FingerprintMismatchError: other_tokens,
    UnauthenticatedError: None,  # tests of access provoke these two
    PermissionDeniedError: None,
    SessionNotFoundError: no_session,
    SessionOffsetError: offset_gap,
    CapacityError: overloaded,
    RateLimitedError: rate_limited,
    QuotaError: over_quota,
    SlowConsumerError: slow_consumer,
    MessageTooLargeError: too_large,
    NotReadyError: not_ready,
    DeadlineError: too_late,
    EngineError: lambda: after_append(fault=Fault.RAISE),
    NonFiniteError: lambda: after_append(fault=Fault.LEAK_NAN),
}
HINTED = {CapacityError, RateLimitedError, QuotaError, NotReadyError}
"""Classes whose provocation says when to come back; the others must not."""


def test_every_class_of_the_table_has_a_row_here() -> None:
    assert set(PROVOKED) == set(ERROR_CODES)


@pytest.mark.parametrize("cls", [cls for cls, run in PROVOKED.items() if run is not None])
async def test_a_provoked_error_arrives_as_its_class(cls: type[TeacherError]) -> None:
    provoke = PROVOKED[cls]
    assert provoke is not None
    error = await asyncio.wait_for(provoke(), 15)
    assert type(error) is cls
    assert bool(error.retry_after_ms) == (cls in HINTED)
    assert error.message


@asynccontextmanager
async def http_of(teacher: LocalTeacher) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP side of a teacher, over a loopback socket."""
    app = teacher.http_app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.should_exit = True
        await serving


class Failing:
    """An engine that fails in the way it is told."""

    def __init__(self, error: TeacherError) -> None:
        self.error = error

    async def score(self, query: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("cls", ERROR_CODES)
async def test_each_class_is_one_code_and_reason_on_every_way_out(cls: type[TeacherError]) -> None:
    """From inside a server to its client: as a status, in-band, and over HTTP."""
    raised = cls("7 is more than 5", retry_after_ms=2500, expected_offset=0, offset=9)
    engine = FakeEngine()
    engine.score = Failing(raised).score  # type: ignore[method-assign]
    code = ERROR_CODES[cls]
    async with local_teacher(engine) as teacher, stub_of(teacher) as stub:
        request = pb.ScoreRequest(
            prompt_ids=codec.encode_ids(PROMPT),
            span=codec.encode_span(SPAN),
            options=pb.ScoreOptions(k=4, temperature=1.0, logprob_dtype=2),
        )
        with pytest.raises(AioRpcError) as caught:
            await stub.Score(request).read()
        assert caught.value.code() is code.grpc
        assert (code.reason, "driftline") in reasons(caught.value)
        over_status = decode_status(caught.value)
        raw = Raw(stub)
        await raw.send(hello=HELLO)
        await raw.open(policy=None)
        await raw.append(SPAN)
        over_stream = await in_band(raw)
        raw.call.cancel()
        async with http_of(teacher) as client:
            answer = await client.post(
                "/v1/score", json={"prompt_ids": [1], "response_ids": [2], "k": 4}
            )
        content = answer.json()["error"]
        assert (answer.status_code, content["reason"]) == (code.http, code.reason)
        over_http = error_from_json(answer.status_code, content)
    assert {type(over_status), type(over_stream), type(over_http)} == {cls}
    assert vars(over_status) == vars(over_stream) == vars(raised)
    if cls is not EngineError:  # HTTP tells nothing of what an engine said
        assert vars(over_http) == vars(raised)
        assert answer.headers["retry-after"] == "3"


def reasons(error: AioRpcError) -> list[tuple[str, str]]:
    status = status_pb2.Status()
    for key, value in error.trailing_metadata():
        if key == "grpc-status-details-bin":
            status.ParseFromString(value)
    found = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            found.append((info.reason, info.domain))
    return found


def strange_errors() -> list[AioRpcError]:
    """Statuses that no server of ours sends."""
    own = encode_status(QuotaError("full", retry_after_ms=7))
    details = dict(own.trailing_metadata)["grpc-status-details-bin"]
    retry = any_pb2.Any(type_url="type.googleapis.com/google.rpc.RetryInfo", value=b"\xff")
    broken = status_pb2.Status(code=8, message="full", details=[retry])
    info = error_details_pb2.ErrorInfo(
        reason="NEWER_THAN_US", domain="driftline", metadata={"offset": "-x"}
    )
    packed = any_pb2.Any()
    packed.Pack(info)
    newer = status_pb2.Status(code=8, message="full", details=[packed])

    def made(code: Any, words: str | None, raw: bytes | None) -> AioRpcError:
        trailing = Metadata(*([] if raw is None else [("grpc-status-details-bin", raw)]))
        return AioRpcError(code, Metadata(), trailing, words)

    exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
    return [
        *(made(code, None, None) for code in grpc.StatusCode),
        made(None, None, None),
        made(exhausted, "full", b"\xff\xff\xff"),
        made(exhausted, "other words", details),
        made(grpc.StatusCode.UNKNOWN, "full", details),
        made(exhausted, "full", broken.SerializeToString()),
        made(exhausted, "full", newer.SerializeToString()),
    ]


@pytest.mark.parametrize("error", strange_errors(), ids=range(len(strange_errors())))
def test_no_status_makes_the_client_fail(error: AioRpcError) -> None:
    decoded = decode_status(error)
    assert type(decoded) in ERROR_CODES
    assert decoded.retry_after_ms == 0
    assert decoded.message


async def test_a_code_that_grpc_does_not_know_arrives_as_an_error() -> None:
    """From a server that puts a number of its own into grpc-status."""

    async def answer(request: bytes, context: Any) -> bytes:
        await context.abort_with_status(
            type("Odd", (), {"code": Odd(), "details": "odd", "trailing_metadata": ()})()
        )
        return b""

    class Odd:
        value = (77, "odd")

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"Odd": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(AioRpcError) as caught:
                await channel.unary_unary("/t/Odd")(b"")
        assert type(decode_status(caught.value)) is EngineError
    finally:
        await server.stop(None)


def test_what_another_http_server_answers_is_read_by_its_status() -> None:
    assert type(error_from_json(429, {})) is CapacityError
    assert type(error_from_json(413, {"reason": 7, "retry_after_ms": "x"})) is MessageTooLargeError
    assert type(error_from_json(418, {"reason": "TEAPOT"})) is EngineError
    told = error_from_json(429, error_to_json(RateLimitedError("x", retry_after_ms=9)))
    assert (type(told), told.retry_after_ms) == (RateLimitedError, 9)


def test_an_unknown_class_in_band_becomes_an_engine_error() -> None:
    message = encode_error(QuotaError("x"), "s")
    message.type = "SomethingNewer"
    assert type(decode_error(message)) is EngineError
