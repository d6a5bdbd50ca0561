"""The servicer over a real loopback socket, spoken to message by message, and with the fake engine.

Run: pytest tests/teacher/test_service.py
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import numpy as np
import pytest
from fake_rows import assert_rows_equal, assert_same_response, cut, make_span
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.scheduler import SchedulerLimits
from teacher_server.stream import StreamLimits
from teacher_server.testing import LocalTeacher, local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.errors import (
    CapacityError,
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    NonFiniteError,
    NotReadyError,
    TeacherError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import DriftPolicy, LogprobDtype, ScoreOptions, TokenSpan
from teacher_wire.status import decode_error, decode_status

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(k=8, w_drop=0.1)
HELLO = pb.Hello(protocol_version=1, run_id="test")


class Raw:
    """A stream without any help: one message out, one message in."""

    def __init__(self, stub: Any) -> None:
        self.call = stub.Session()

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
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return decode_status(caught.value)


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


async def eventually(check: Any, timeout_s: float = 5.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < give_up, "did not happen in time"
        await asyncio.sleep(0.01)


async def test_info_tells_what_is_served() -> None:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        reply = await stub.GetInfo(pb.GetInfoRequest())
        assert codec.decode_info(reply.info) == teacher.info


@pytest.mark.parametrize(
    ("hello", "text"),
    [
        (pb.Hello(protocol_version=2), "protocol_version is 2, the server speaks 1"),
        (pb.Hello(protocol_version=1, tokenizer_fingerprint="other"), "fingerprint is other"),
        (pb.Hello(protocol_version=1, vocab_size=511), "vocab_size is 511, the teacher's is 512"),
    ],
)
async def test_a_wrong_handshake_is_refused_before_any_work(hello: pb.Hello, text: str) -> None:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(hello=hello)
        error = await raw.failure()
        assert type(error) is FingerprintMismatchError
        assert text in error.message
        assert await raw.call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_the_first_message_must_be_hello() -> None:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(close=pb.Close(session_id="s"))
        error = await raw.failure()
        assert type(error) is InvalidRequestError
        assert "must be hello" in error.message


async def test_a_loading_server_refuses_with_a_hint() -> None:
    async with local_teacher(ready=lambda: False) as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(hello=HELLO)
        error = await raw.failure()
        assert type(error) is NotReadyError
        assert error.retry_after_ms == 1000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Score(pb.ScoreRequest()).read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert codec.decode_info((await stub.GetInfo(pb.GetInfoRequest())).info) == teacher.info


async def test_messages_of_one_session_are_answered_in_order() -> None:
    span = make_span(60)
    async with raw_stream() as (raw, teacher):
        await raw.open()
        for start in (0, 20, 40):
            await raw.append(cut(span, start, start + 20))
        await raw.send(close=pb.Close(session_id="s"))
        replies = [await raw.receive() for _ in range(5)]
        kinds = [reply.WhichOneof("message") for reply in replies]
        assert kinds == ["opened", "scores", "scores", "scores", "closed"]
        parts = [codec.decode_scores([reply.scores]) for reply in replies[1:4]]
        whole = await teacher.sessions.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")
        assert_same_response(parts, whole)


async def test_a_stuck_session_does_not_hold_up_another() -> None:
    engine = FakeEngine()
    async with raw_stream(engine) as (raw, _):
        await raw.open("stuck")
        await raw.open("free")
        for _ in range(2):
            assert (await raw.receive()).HasField("opened")
        engine.inject(Fault.HANG)
        await raw.append(make_span(5), "stuck")
        await eventually(lambda: engine.num_queries == 1)
        await raw.append(make_span(5), "free")
        assert (await asyncio.wait_for(raw.receive(), 5)).scores.session_id == "free"


async def test_errors_are_in_band_and_the_stream_lives_on() -> None:
    engine = FakeEngine()
    async with raw_stream(engine) as (raw, teacher):
        await raw.append(make_span(5), "unknown")
        await raw.send()
        await raw.send(hello=HELLO)
        await raw.open("s", prompt_ids=b"\0\0\0")
        await raw.open()
        errors = [(await raw.receive()).error for _ in range(4)]
        assert sorted(error.type for error in errors) == [
            "InvalidRequestError",
            "InvalidRequestError",
            "InvalidRequestError",
            "SessionNotFoundError",
        ]
        assert (await raw.receive()).opened.next_offset == 0
        await raw.append(make_span(5, offset=7))
        gap = (await raw.receive()).error
        assert (gap.expected_offset, gap.offset, gap.retryable) == (0, 7, True)
        engine.inject(Fault.NAN)
        await raw.append(make_span(5))
        assert type(decode_error((await raw.receive()).error)) is NonFiniteError
        await raw.append(make_span(5))
        assert (await raw.receive()).scores.last
        value = teacher.metrics.registry.get_sample_value
        assert value("teacher_errors_total", {"type": "InvalidRequestError"}) == 3


async def test_a_large_answer_comes_in_chunks_below_the_limit() -> None:
    span = make_span(2000, width=64)
    engine = FakeEngine()
    async with raw_stream(engine) as (raw, teacher):
        options = ScoreOptions(k=128, logprob_dtype=LogprobDtype.F32)
        await raw.open(options=codec.encode_options(options))
        assert (await raw.receive()).HasField("opened")
        await raw.append(span)
        chunks = [await raw.receive()]
        while not chunks[-1].scores.last:
            chunks.append(await raw.receive())
        assert len(chunks) >= 2
        assert max(chunk.ByteSize() for chunk in chunks) <= codec.MAX_REPLY_BYTES
        scores = codec.decode_scores([chunk.scores for chunk in chunks])
        whole = await teacher.sessions.score_once(PROMPT, span, options, POLICY, tenant="t")
        assert_same_response([scores], whole)


async def test_requests_above_grpcs_default_limit_pass_and_larger_ones_do_not() -> None:
    engine = FakeEngine(max_k=512)
    async with local_teacher(engine) as teacher, stub_of(teacher) as stub:
        for width, code in ((330, None), (1100, grpc.StatusCode.RESOURCE_EXHAUSTED)):
            span = TokenSpan(
                offset=0,
                token_ids=np.zeros(4000, np.int32),
                candidate_ids=np.zeros((4000, width), np.int32),
            )
            request = pb.ScoreRequest(
                prompt_ids=codec.encode_ids(PROMPT),
                span=codec.encode_span(span),
                options=codec.encode_options(ScoreOptions(k=1)),
            )
            assert request.ByteSize() > (4 << 20)
            if code is None:
                chunks = [chunk async for chunk in stub.Score(request)]
                assert len(codec.decode_scores(chunks).rows) == 4000
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Score(request).read()
                assert caught.value.code() is code
                assert decode_status(caught.value).retry_after_ms == 0


async def test_scores_wait_for_credit() -> None:
    hello = pb.Hello(protocol_version=1, credit_bytes=1)
    async with raw_stream(hello=hello) as (raw, _):
        await raw.open()
        assert (await raw.receive()).HasField("opened")
        await raw.append(cut(make_span(20), 0, 10))
        await raw.append(cut(make_span(20), 10, 20))
        first = await raw.receive()
        assert first.HasField("scores")
        reading = asyncio.ensure_future(raw.call.read())
        await asyncio.sleep(0.2)
        assert not reading.done()
        await raw.send(credit=pb.Credit(bytes=first.ByteSize()))
        assert (await reading).HasField("scores")


async def test_a_client_that_takes_nothing_is_cut_off_alone() -> None:
    limits = StreamLimits(slow_client_s=0.3)
    hello = pb.Hello(protocol_version=1, credit_bytes=1)
    async with raw_stream(hello=hello, stream_limits=limits) as (slow, teacher):
        async with stub_of(teacher) as stub:
            other = Raw(stub)
            await other.send(hello=HELLO)
            await slow.open()
            await other.open("other")
            for start in (0, 10, 20):
                await slow.append(cut(make_span(30), start, start + 10))
            error = await slow.failure()
            assert type(error) is CapacityError
            assert "too slow" in error.message
            assert error.retry_after_ms == 0
            await other.append(make_span(5), "other")
            kinds = [(await other.receive()).WhichOneof("message") for _ in range(3)]
            assert kinds == ["welcome", "opened", "scores"]


async def test_replies_to_a_slow_client_are_bounded() -> None:
    limits = StreamLimits(max_reply_bytes=1 << 20)
    hello = pb.Hello(protocol_version=1, credit_bytes=1)
    engine = FakeEngine()
    async with raw_stream(engine, hello=hello, stream_limits=limits) as (raw, teacher):
        names = [f"s{i}" for i in range(30)]
        for name in names:
            await raw.open(name, options=codec.encode_options(ScoreOptions(k=128)))
            await raw.append(make_span(100, width=8), name)
        await eventually(lambda: engine.num_queries == 30)
        await asyncio.sleep(0.1)
        (stream,) = teacher.service._streams
        assert 0 < stream._replies.num_bytes <= 1 << 20
        await raw.send(credit=pb.Credit(bytes=1 << 30))
        seen = set()
        while len(seen) < 30:
            reply = await raw.receive()
            if reply.HasField("scores"):
                seen.add(reply.scores.session_id)
        assert seen == set(names)


async def test_a_client_that_asks_too_much_is_cut_off() -> None:
    engine = FakeEngine()
    limits = StreamLimits(max_request_bytes=20_000)
    async with raw_stream(engine, stream_limits=limits) as (raw, _):
        await raw.open()
        engine.inject(Fault.HANG)
        # One runs, two wait, the fourth is too much. None follows: grpc.aio forgets the status of a
        # stream when a write fails before the status is read.
        for _ in range(4):
            await raw.append(make_span(100))
        error = await raw.failure()
        assert type(error) is CapacityError
        assert "20000 bytes" in error.message


async def test_sessions_end_with_a_finished_stream_and_stay_after_a_broken_one() -> None:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        for finish in (True, False):
            raw = Raw(stub)
            await raw.send(hello=HELLO)
            await raw.open()
            await raw.append(make_span(5))
            for _ in range(3):
                await raw.receive()
            if finish:
                await raw.call.done_writing()
                assert await raw.call.read() is grpc.aio.EOF
                assert len(teacher.sessions) == 0
            else:
                raw.call.cancel()
                await eventually(lambda: not teacher.service._streams)
                assert len(teacher.sessions) == 1


async def test_a_vanished_client_frees_the_engine() -> None:
    engine = FakeEngine()
    async with raw_stream(engine, scheduler_limits=SchedulerLimits(max_running=1)) as (raw, teacher):
        await raw.open()
        engine.inject(Fault.HANG)
        await raw.append(make_span(5))
        await eventually(lambda: teacher.scheduler.num_running == 1)
        raw.call.cancel()
        await eventually(lambda: teacher.scheduler.num_running == 0)
        await eventually(lambda: not teacher.service._streams)


async def test_an_append_past_its_deadline_is_dropped_before_the_engine() -> None:
    engine = FakeEngine()
    async with raw_stream(engine, scheduler_limits=SchedulerLimits(max_running=1)) as (raw, _):
        await raw.open("stuck")
        await raw.open("late")
        engine.inject(Fault.HANG)
        await raw.append(make_span(5), "stuck")
        await eventually(lambda: engine.num_queries == 1)
        await raw.append(make_span(5), "late", deadline_ms=30)
        for _ in range(2):
            assert (await raw.receive()).HasField("opened")
        error = (await raw.receive()).error
        assert type(decode_error(error)) is DeadlineError
        assert engine.num_queries == 1


async def test_score_equals_a_session_and_reports_errors_as_status() -> None:
    span = make_span(50)
    engine = FakeEngine()
    async with local_teacher(engine) as teacher, stub_of(teacher) as stub:
        request = pb.ScoreRequest(
            prompt_ids=codec.encode_ids(PROMPT),
            span=codec.encode_span(span),
            options=codec.encode_options(OPTIONS),
            policy=codec.encode_policy(POLICY),
        )
        scores = codec.decode_scores([chunk async for chunk in stub.Score(request)])
        whole = await teacher.sessions.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")
        assert_rows_equal(scores.rows, whole.rows)
        engine.inject(Fault.LEAK_NAN)
        request.options.k = 4096
        for text, cls in (("k is 4096", InvalidRequestError), ("token_logprobs", NonFiniteError)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Score(request).read()
            assert type(decode_status(caught.value)) is cls
            assert text in decode_status(caught.value).message
            request.options.k = 16
        value = teacher.metrics.registry.get_sample_value
        labels = {
            "grpc_type": "server_stream",
            "grpc_service": "opd.teacher.v1.TeacherService",
            "grpc_method": "Score",
        }
        handled = "grpc_server_handled_total"
        assert value(handled, {**labels, "grpc_code": "INVALID_ARGUMENT"}) == 1
        assert value(handled, {**labels, "grpc_code": "OK"}) == 1


async def test_draining_answers_what_was_asked_then_ends_the_stream() -> None:
    engine = FakeEngine(base_latency_s=0.3)
    async with raw_stream(engine) as (raw, teacher):
        await raw.open()
        await raw.append(make_span(5))
        await eventually(lambda: engine.num_queries == 1)
        draining = asyncio.create_task(teacher.service.drain("test", 5.0))
        assert (await raw.receive()).HasField("opened")
        go_away = (await raw.receive()).go_away
        assert (go_away.reason, go_away.deadline_ms) == ("test", 5000)
        await raw.open("late")
        replies = [await raw.receive() for _ in range(2)]
        assert {reply.WhichOneof("message") for reply in replies} == {"scores", "error"}
        (refused,) = [reply.error for reply in replies if reply.HasField("error")]
        assert type(decode_error(refused)) is NotReadyError
        assert await raw.call.read() is grpc.aio.EOF
        assert await draining


async def test_draining_gives_up_on_a_stuck_stream() -> None:
    engine = FakeEngine()
    async with raw_stream(engine) as (raw, teacher):
        await raw.open()
        engine.inject(Fault.HANG)
        await raw.append(make_span(5))
        await eventually(lambda: engine.num_queries == 1)
        assert not await teacher.service.drain("test", 0.2)


async def test_capacity_is_answered_with_a_hint() -> None:
    engine = FakeEngine()
    async with raw_stream(
        engine, info=teacher_info(engine, max_sessions=1), evict_idle_s=60.0
    ) as (raw, _):
        await raw.open("first")
        await raw.open("second")
        replies = [await raw.receive() for _ in range(2)]
        (error,) = [reply.error for reply in replies if reply.HasField("error")]
        assert (error.type, error.session_id) == ("CapacityError", "second")
        assert error.retry_after_ms > 0


def mutated(message: bytes, chance: random.Random) -> bytes:
    raw = bytearray(message)
    for _ in range(chance.randint(0, 4)):
        position = chance.randrange(len(raw))
        match chance.randrange(3):
            case 0:
                raw[position] = chance.randrange(256)
            case 1:
                del raw[position]
            case _:
                raw.insert(position, chance.randrange(256))
    return bytes(raw)


async def test_mutated_messages_never_take_the_server_down(caplog: Any) -> None:
    chance = random.Random(7)
    seeds = [
        pb.SessionRequest(
            open=pb.Open(
                session_id="s",
                prompt_ids=codec.encode_ids(PROMPT),
                options=codec.encode_options(OPTIONS),
                policy=codec.encode_policy(POLICY),
            )
        ).SerializeToString(),
        pb.SessionRequest(
            append=pb.Append(session_id="s", span=codec.encode_span(make_span(4)))
        ).SerializeToString(),
        pb.SessionRequest(close=pb.Close(session_id="s")).SerializeToString(),
        pb.SessionRequest(credit=pb.Credit(bytes=9)).SerializeToString(),
    ]
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        sent = 0
        while sent < 2000:
            raw = Raw(stub)
            await raw.send(hello=HELLO)
            for _ in range(200):
                try:
                    message = pb.SessionRequest.FromString(mutated(chance.choice(seeds), chance))
                except Exception:  # noqa: BLE001 - undecodable bytes never reach a servicer
                    continue
                await raw.call.write(message)
                sent += 1
            await raw.call.done_writing()
            codes = set()
            while (reply := await asyncio.wait_for(raw.call.read(), 10)) is not grpc.aio.EOF:
                codes.add(reply.error.type)
            assert not codes & {"EngineError", "NonFiniteError"}
        assert len(teacher.sessions) == 0
        assert teacher.scheduler.num_running == 0
    assert not [record for record in caplog.records if record.exc_info]
