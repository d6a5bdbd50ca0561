"""Messages at the limits: one byte less, the limit, one byte more; and what stays unharmed.

Run: pytest tests/faults/test_message_limits.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from teacher_server.testing import local_teacher
from teacher_wire import codec
from teacher_wire.errors import InvalidRequestError, MessageTooLargeError, TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import ScoreOptions, TokenSpan
from teacher_wire.status import decode_status
from tests.faults.live_server import live_server
from tests.teacher.rpc.raw_streams import HELLO, Raw
from tests.teacher.scoring.fake_rows import make_span
from tests.waiting import LIMIT_S, wait_until

LIMIT = codec.MAX_MESSAGE_BYTES
GIVEN_BACK = 4 << 20
NUM_REFUSED = 15
"""Connections with one message each: buffers that a process keeps for ever, up to 5 MiB, are there
after ten or so."""
UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def request_of(size: int) -> pb.ScoreRequest:
    """A request of exactly so many bytes, which is refused for its contents if it arrives."""
    request = pb.ScoreRequest(prompt_ids=bytes(size - 100))
    request.run_id = "r" * (98 - (request.ByteSize() - (size - 100)))
    assert request.ByteSize() == size
    return request


async def error_of(call: Any) -> TeacherError:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return decode_status(error)
    raise AssertionError("the call did not fail")


@pytest.mark.parametrize(
    ("size", "error"),
    [
        (LIMIT - 1, InvalidRequestError),
        (LIMIT, InvalidRequestError),
        (LIMIT + 1, MessageTooLargeError),
    ],
)
async def test_a_request_at_the_limit_arrives_and_one_byte_more_is_refused(
    size: int, error: type[TeacherError]
) -> None:
    async with local_teacher() as teacher:
        async with grpc.aio.insecure_channel(teacher.address, options=UNBOUNDED) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            neighbour = Raw(stub)
            await neighbour.send(hello=HELLO)
            await neighbour.open()
            told = await error_of(stub.Score(request_of(size), timeout=LIMIT_S))
            assert type(told) is error
            assert told.retry_after_ms == 0
            await neighbour.append(make_span(5))
            kinds = [(await neighbour.receive()).WhichOneof("message") for _ in range(3)]
            assert kinds == ["welcome", "opened", "scores"]
            neighbour.call.cancel()


async def test_a_stream_with_too_large_a_message_ends_alone_and_its_sessions_stay() -> None:
    async with local_teacher() as teacher:
        async with grpc.aio.insecure_channel(teacher.address, options=UNBOUNDED) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            bad, good = Raw(stub), Raw(stub)
            for raw, name in ((bad, "bad"), (good, "good")):
                await raw.send(hello=HELLO)
                await raw.open(name)
                for _ in range(2):
                    await raw.receive()
            await bad.send(open=pb.Open(session_id="huge", prompt_ids=bytes(LIMIT)))
            code = await asyncio.wait_for(bad.call.code(), LIMIT_S)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            await good.append(make_span(5), "good")
            assert (await good.receive()).HasField("scores")
            await good.append(make_span(5), "bad")
            assert (await good.receive()).HasField("scores")
            good.call.cancel()


@pytest.mark.e2e
def test_memory_of_messages_that_are_too_large_is_given_back(tmp_path: Path) -> None:
    async def refused(address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=UNBOUNDED) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            told = await error_of(stub.Score(request_of(LIMIT + 1), timeout=LIMIT_S))
            assert type(told) is MessageTooLargeError

    with live_server(tmp_path) as teacher:
        before = 0
        for _ in range(NUM_REFUSED):  # what a process allocates once is there after these
            asyncio.run(refused(teacher.address))
            before = max(before, teacher.rss_bytes())
        for _ in range(NUM_REFUSED):
            asyncio.run(refused(teacher.address))
        wait_until(lambda: teacher.rss_bytes() - before <= GIVEN_BACK)


async def test_an_answer_of_more_than_4_mib_arrives_in_messages_below_1_mib() -> None:
    ids = np.arange(4097, dtype=np.int32) % 512
    request = pb.ScoreRequest(
        prompt_ids=codec.encode_ids(ids[:5]),
        span=codec.encode_span(TokenSpan(offset=0, token_ids=ids)),
        options=codec.encode_options(ScoreOptions(k=128)),
    )
    async with local_teacher() as teacher:
        # gRPC's own default of 4 MiB: no single message comes near it.
        async with grpc.aio.insecure_channel(teacher.address) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            chunks = [chunk async for chunk in stub.Score(request)]
    assert sum(chunk.ByteSize() for chunk in chunks) > 4 << 20
    assert max(chunk.ByteSize() for chunk in chunks) <= codec.MAX_REPLY_BYTES
    assert len(codec.decode_scores(chunks).rows) == 4097


async def test_metadata_of_17_kb_is_refused_and_the_connection_goes_on() -> None:
    async with local_teacher() as teacher:
        async with grpc.aio.insecure_channel(teacher.address) as channel:
            stub = pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetInfo(pb.GetInfoRequest(), metadata=[("x-much", "m" * 17_000)])
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert decode_status(caught.value).retry_after_ms == 0
            answer = await stub.GetInfo(pb.GetInfoRequest(), timeout=LIMIT_S)
            assert answer.info.vocab_size == 512
