"""Messages in one batch mean what they would mean one by one, and only those who understand batches
get any. Run: pytest tests/teacher/rpc/test_batches.py
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacher_client.client import TeacherClient
from teacher_client.outbox import Outbox
from teacher_client.retry import BrokenStreamError, RetryLimits
from teacher_client.stream import Handshake, TeacherStream
from teacher_server.rpc.replies import ReplyQueue
from teacher_server.testing import local_teacher
from teacher_wire import batches
from teacher_wire.batches import MAX_BATCH_BYTES, MAX_BATCH_MESSAGES
from teacher_wire.pb import teacher_pb2 as pb
from tests.faults.streams import SERVICE, append_message, batch_of, open_message
from tests.teacher.rpc.raw_streams import HELLO, OPTIONS, POLICY, PROMPT, Raw, raw_stream, stub_of
from tests.teacher.scoring.fake_rows import cut, make_span
from tests.waiting import LIMIT_S

WITH_BATCHES = pb.Hello(protocol_version=1, run_id="test", accepts_batches=True)


def append_request(name: str, start: int, stop: int) -> pb.SessionRequest:
    return append_message(name, cut(make_span(60), start, stop))


def conversation() -> list[pb.SessionRequest]:
    """Three sessions side by side, with mistakes, that end."""
    lanes = [
        [
            open_message(name),
            append_request(name, 0, 20),
            append_request(name, 50, 60),
            append_request(name, 20, 50),
            append_request(name, 10, 40),
            pb.SessionRequest(close=pb.Close(session_id=name)),
        ]
        for name in "abc"
    ]
    return [message for together in zip(*lanes, strict=True) for message in together]


def flat(message: pb.SessionResponse) -> list[pb.SessionResponse]:
    return [one for one, _ in batches.decode_responses(message.SerializeToString())]


def without_times(message: pb.SessionResponse) -> bytes:
    if message.HasField("scores"):
        message.scores.ClearField("timing")
    return message.SerializeToString()


async def answers(
    pieces: list[list[pb.SessionRequest]], hello: pb.Hello
) -> tuple[dict[str, list[bytes]], int]:
    """What each session was answered, and in how many messages."""
    async with raw_stream(hello=hello) as (raw, _):
        for piece in pieces:
            if len(piece) == 1:
                await raw.call.write(piece[0])
            else:
                await raw.send(batch=batch_of(piece))
        await raw.call.done_writing()
        found: dict[str, list[bytes]] = {}
        num_messages = 0
        while (message := await asyncio.wait_for(raw.call.read(), LIMIT_S)) is not grpc.aio.EOF:
            num_messages += 1
            for one in flat(message):
                kind = str(one.WhichOneof("message"))
                name = getattr(one, kind).session_id
                found.setdefault(name, []).append(without_times(one))
        return found, num_messages


@pytest.mark.parametrize("seed", range(6))
async def test_any_split_into_batches_is_answered_alike(seed: int) -> None:
    chance = random.Random(seed)
    messages = conversation()
    one_by_one, num_messages = await answers([[each] for each in messages], HELLO)
    assert num_messages == len(messages)
    pieces: list[list[pb.SessionRequest]] = [[]]
    for message in messages:
        if pieces[-1] and chance.random() < 0.3:
            pieces.append([])
        pieces[-1].append(message)
    found, num_messages = await answers(pieces, WITH_BATCHES)
    assert found == one_by_one
    assert num_messages <= len(messages)


async def test_who_does_not_say_so_gets_no_batch() -> None:
    found, num_messages = await answers([conversation()], HELLO)
    assert num_messages == sum(map(len, found.values()))


async def test_answers_that_are_ready_together_leave_together() -> None:
    found, num_messages = await answers([conversation()], WITH_BATCHES)
    assert num_messages < sum(map(len, found.values()))


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ({"hello": HELLO}, "message is hello, must be"),
        ({"batch": b""}, "message is batch, must be"),
        ({}, "message is empty or unreadable, must be"),
    ],
)
async def test_what_may_not_be_in_a_batch_is_refused_alone(inside: Any, reason: str) -> None:
    message = pb.SessionRequest(**inside)
    closing = pb.SessionRequest(close=pb.Close(session_id="s"))
    async with raw_stream() as (raw, _):
        await raw.send(batch=batch_of([message, closing]))
        error = (await raw.receive()).error
        assert error.type == "InvalidRequestError"
        assert reason in error.message
        assert (await raw.receive()).HasField("closed")


async def test_unreadable_bytes_in_a_batch_are_refused_alone() -> None:
    closing = pb.SessionRequest(close=pb.Close(session_id="s")).SerializeToString()
    async with raw_stream() as (raw, _):
        batch = pb.RequestBatch(requests=[b"\xff\xff\xff", closing])
        await raw.send(batch=batch.SerializeToString())
        assert "unreadable" in (await raw.receive()).error.message
        assert (await raw.receive()).HasField("closed")


async def test_a_batch_of_too_many_is_refused_whole() -> None:
    closing = pb.SessionRequest(close=pb.Close(session_id="s"))
    async with raw_stream() as (raw, _):
        await raw.send(batch=batch_of([closing] * (MAX_BATCH_MESSAGES + 1)))
        error = (await raw.receive()).error
        assert error.type == "InvalidRequestError"
        assert f"{MAX_BATCH_MESSAGES + 1} messages, the limit is {MAX_BATCH_MESSAGES}" in (
            error.message
        )
        await raw.send(batch=batch_of([closing] * MAX_BATCH_MESSAGES))
        for _ in range(MAX_BATCH_MESSAGES):
            assert (await raw.receive()).HasField("closed")


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (b"\x0a\x00" * (8 << 19), "a batch has 8388608 bytes, the limit is 1048576"),
        (b"\x0a\xff", "a batch cannot be read"),
    ],
)
async def test_a_batch_that_is_none_is_refused_before_it_costs(batch: bytes, reason: str) -> None:
    async with raw_stream() as (raw, _):
        await raw.send(batch=batch)
        error = (await raw.receive()).error
        assert error.type == "InvalidRequestError"
        assert reason in error.message
        await raw.send(close=pb.Close(session_id="s"))
        assert (await raw.receive()).HasField("closed")


async def test_the_first_message_is_no_batch() -> None:
    async with local_teacher() as teacher, stub_of(teacher) as stub:
        raw = Raw(stub)
        await raw.send(batch=batch_of([pb.SessionRequest(hello=HELLO)]))
        assert "first message is batch, must be hello" in (await raw.failure()).message


@given(st.lists(st.sampled_from([0, 1, 127, 128, 16_383, 16_384, 300_000]), min_size=2, max_size=6))
def test_batches_are_framed_as_protobuf_would(sizes: list[int]) -> None:
    messages = [bytes([index]) * size for index, size in enumerate(sizes)]
    assert batches.encode_requests(messages) == batches.slow_encode_requests(messages)
    assert batches.encode_responses(messages) == batches.slow_encode_responses(messages)


# The queue of replies


def scores(size: int) -> pb.SessionResponse:
    """Of about that many bytes."""
    rows = pb.ScoreRows(topk_ids=b"x" * size)
    return pb.SessionResponse(scores=pb.Scores(session_id="s", rows=rows))


async def test_each_reply_in_a_batch_uses_up_credit_by_itself() -> None:
    size = len(scores(100).SerializeToString())
    replies = ReplyQueue(max_bytes=1 << 20, credit_bytes=2 * size + 1, batches=True)
    for _ in range(5):
        await replies.put(scores(100))
    assert len(await replies.take()) == 3, "the third while the balance is still above 0"
    replies.written()
    assert replies.num_bytes == 2 * size
    waiting = asyncio.create_task(replies.take())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    replies.grant(size)  # the balance was 1 - size
    assert len(await waiting) == 1
    replies.written()
    assert replies.num_bytes == size


async def test_what_needs_no_credit_waits_behind_what_does() -> None:
    closed = pb.SessionResponse(closed=pb.Closed(session_id="s"))
    replies = ReplyQueue(max_bytes=1 << 20, credit_bytes=1, batches=True)
    for reply in (closed, scores(10), scores(10), closed):
        await replies.put(reply)
    assert len(await replies.take()) == 2


async def test_a_batch_of_replies_is_bounded_and_a_larger_reply_goes_alone() -> None:
    replies = ReplyQueue(max_bytes=64 << 20, credit_bytes=0, batches=True)
    for size in (MAX_BATCH_BYTES // 3, MAX_BATCH_BYTES // 3, MAX_BATCH_BYTES // 2):
        await replies.put(scores(size))
    await replies.put(scores(2 * MAX_BATCH_BYTES))
    taken = []
    for _ in range(3):
        taken.append(await replies.take())
        replies.written()
    assert [len(each) for each in taken] == [2, 1, 1]
    assert replies.num_bytes == 0


# The requests of a client


async def test_an_outbox_keeps_the_order_and_splits_by_size() -> None:
    outbox = Outbox()
    outbox.batches = True
    sizes = [10, 20, MAX_BATCH_BYTES, 5, 6, MAX_BATCH_BYTES + 1, 7]
    sent = [bytes([index]) * size for index, size in enumerate(sizes)]
    for request in sent:
        outbox.put(request)
    outbox.end()
    taken = []
    while batch := await outbox.take():
        taken.append(batch)
    assert [request for batch in taken for request in batch] == sent
    assert [len(batch) for batch in taken] == [2, 1, 2, 1, 1]
    assert await outbox.take() == []


async def test_an_outbox_bounds_the_number_of_messages() -> None:
    outbox = Outbox()
    outbox.batches = True
    for _ in range(MAX_BATCH_MESSAGES + 3):
        outbox.put(b"x")
    assert [len(await outbox.take()) for _ in range(2)] == [MAX_BATCH_MESSAGES, 3]


async def test_an_outbox_without_batches_gives_one_at_a_time() -> None:
    outbox = Outbox()
    for _ in range(3):
        outbox.put(b"x")
    assert [len(await outbox.take()) for _ in range(3)] == [1, 1, 1]


class Watched(Outbox):
    """Knows how many requests left at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    async def take(self) -> list[bytes]:
        taken = await super().take()
        self.largest = max(self.largest, len(taken))
        return taken


@pytest.mark.parametrize("understood", [True, False])
async def test_a_client_sends_batches_only_to_a_server_that_understands_them(
    understood: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Watched] = []

    def outbox() -> Watched:
        made.append(Watched())
        return made[-1]

    monkeypatch.setattr("teacher_client.stream.Outbox", outbox)
    welcome = pb.Welcome
    monkeypatch.setattr(
        pb, "Welcome", lambda info, accepts_batches: welcome(info=info, accepts_batches=understood)
    )
    async with local_teacher() as teacher:
        client = await TeacherClient.connect(
            [teacher.address],
            tokenizer_fingerprint="",
            vocab_size=0,
            run_id="test",
            limits=RetryLimits(),
        )
        sessions = [client.open(PROMPT, OPTIONS, POLICY) for _ in range(6)]
        alike = []
        for span in (cut(make_span(60), 0, 20), cut(make_span(60), 20, 60)):
            alike += await asyncio.gather(*(session.append(span) for session in sessions))
        await client.aclose()
    for scored in alike:
        like = alike[0] if scored.rows.offset == 0 else alike[-1]
        np.testing.assert_array_equal(scored.rows.topk_logprobs, like.rows.topk_logprobs)
    assert (made[0].largest > 1) is understood


async def test_bytes_that_are_no_message_break_the_stream_at_once() -> None:
    async def session(requests: AsyncIterator[bytes], context: Any) -> None:
        await anext(aiter(requests))
        await context.write(pb.SessionResponse(welcome=pb.Welcome()).SerializeToString())
        await anext(aiter(requests))
        await context.write(b"\xff\xff\xff")
        await asyncio.Event().wait()

    server = grpc.aio.server()
    handlers = {"Session": grpc.stream_stream_rpc_method_handler(session)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    handshake = Handshake(tokenizer_fingerprint="", vocab_size=0, run_id="test")
    stream, _ = await TeacherStream.connect(f"127.0.0.1:{port}", handshake, 10.0)
    closing = pb.SessionRequest(close=pb.Close(session_id="s")).SerializeToString()
    with pytest.raises(BrokenStreamError, match="what is no message of this contract"):
        await asyncio.wait_for(stream.exchange("s", [closing]), LIMIT_S)
    await stream.aclose()
    await server.stop(None)
