"""The servicer over a real loopback socket. Run: pytest tests/teacher/rpc/test_service.py"""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.testing import local_teacher
from teacher_wire import codec
from teacher_wire.errors import (
    FingerprintMismatchError,
    InvalidRequestError,
    NonFiniteError,
    NotReadyError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import LogprobDtype, ScoreOptions, TokenSpan
from teacher_wire.status import decode_error, decode_status
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
from tests.teacher.scoring.fake_rows import assert_rows_equal, assert_same_response, cut, make_span
from tests.waiting import LIMIT_S


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
        assert (await asyncio.wait_for(raw.receive(), LIMIT_S)).scores.session_id == "free"


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
