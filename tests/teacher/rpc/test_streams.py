"""One stream against bad clients, and its end. Run: pytest tests/teacher/rpc/test_streams.py"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from typing import Any, cast

import grpc

from teacher_server.admission.scheduler import SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.metrics.tallies import MessageTally
from teacher_server.rpc.stream import SessionStream, StreamLimits
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire import codec
from teacher_wire.errors import (
    DeadlineError,
    NotReadyError,
    QuotaError,
    SlowConsumerError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import ScoreOptions
from teacher_wire.status import decode_error
from tests.teacher.rpc.raw_streams import (
    HELLO,
    OPTIONS,
    POLICY,
    PROMPT,
    Raw,
    eventually,
    raw_stream,
    stub_of,
)
from tests.teacher.scoring.fake_rows import cut, make_span
from tests.waiting import LIMIT_S


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
            assert type(error) is SlowConsumerError
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
        await eventually(lambda: engine.num_queries >= 8)
        await asyncio.sleep(0.1)
        assert engine.num_queries <= 12  # the others would have no room for their answers
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
        assert type(error) is QuotaError
        assert "20000 bytes" in error.message


async def test_sessions_end_with_a_finished_stream_and_soon_after_a_broken_one() -> None:
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
                await eventually(lambda: len(teacher.sessions) == 0)
                assert b'teacher_sessions{state="open"} 0.0' in teacher.metrics.render()


async def test_a_vanished_client_frees_the_engine() -> None:
    engine = FakeEngine()
    async with raw_stream(engine, scheduler_limits=SchedulerLimits(max_running=1)) as (
        raw,
        teacher,
    ):
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
    async with raw_stream(engine, info=teacher_info(engine, max_sessions=1), evict_idle_s=60.0) as (
        raw,
        _,
    ):
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
            while (reply := await asyncio.wait_for(raw.call.read(), LIMIT_S)) is not grpc.aio.EOF:
                codes.add(reply.error.type)
            assert not codes & {"EngineError", "NonFiniteError"}
        assert len(teacher.sessions) == 0
        assert teacher.scheduler.num_running == 0
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_pending_read_or_write_is_never_cancelled() -> None:
    """grpc.aio never frees what belongs to an operation whose future was cancelled."""
    cancelled: list[str] = []

    async def pending(name: str) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    class Context:
        def write(self, reply: bytes) -> Awaitable[None]:
            return pending("write")

    async def requests() -> AsyncIterator[bytes]:
        await pending("read")
        yield b""

    async with local_teacher() as teacher:
        stream = SessionStream(
            cast("Any", Context()),
            teacher.sessions,
            tenant="t",
            credit_bytes=0,
            accepts_batches=True,
            limits=StreamLimits(),
            metrics=teacher.metrics,
            tally=MessageTally(),
        )
        before = asyncio.all_tasks()
        running = asyncio.create_task(stream.run(requests(), pb.TeacherInfo()))
        await eventually(lambda: len(asyncio.all_tasks() - before) >= 3)  # and the read, the write
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        left = asyncio.all_tasks() - before
        assert cancelled == []
        assert len(left) == 2, "the read and the write"
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def num_streams() -> int:
    """In memory, whether anything still refers to them or not."""
    return sum(type(each) is SessionStream for each in gc.get_objects())


async def test_a_cancelled_stream_leaves_nothing_to_the_collector() -> None:
    async with raw_stream() as (raw, _):
        await raw.open()
        await raw.append(make_span(20))
        gc.collect()
        gc.disable()
        try:
            assert num_streams() == 1
            raw.call.cancel()
            await eventually(lambda: num_streams() == 0)
        finally:
            gc.enable()


async def test_a_reader_that_waits_for_room_ends_with_its_stream() -> None:
    """It waits for the reply queue, not for gRPC, and nobody would ever wake it."""
    limits = StreamLimits(max_reply_bytes=100, slow_client_s=0.2)
    async with raw_stream(
        hello=pb.Hello(protocol_version=1, credit_bytes=1), stream_limits=limits
    ) as (raw, _):
        await raw.open()
        await raw.append(make_span(20))
        await raw.append(replace(make_span(20), offset=20))
        for _ in range(20):
            await raw.send()
        assert isinstance(await raw.failure(), SlowConsumerError)
        await eventually(
            lambda: not [t for t in asyncio.all_tasks() if "SessionStream" in str(t.get_coro())]
        )
