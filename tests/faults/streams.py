"""Sessions of a test that speak the contract themselves, message by message."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from teacher_wire import codec
from teacher_wire.batches import decode_responses
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.errors import TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import DriftPolicy, ScoreOptions, TokenSpan
from teacher_wire.status import decode_status
from tests.waiting import eventually

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=1e-6)
SERVICE = "opd.teacher.v1.TeacherService"


def span_at(offset: int, num_tokens: int, *, k: int = 16) -> TokenSpan:
    """Tokens and candidates that are a function of their place."""
    return span_of(offset, offset, num_tokens, 512, k=k)


def span_of(seed: int, offset: int, num_tokens: int, vocabulary: int, *, k: int = 16) -> TokenSpan:
    """Tokens and candidates that are a function of the seed."""
    rng = np.random.default_rng(seed)
    token_ids = rng.integers(0, vocabulary, num_tokens, dtype=np.int32)
    order = np.argsort(rng.random((num_tokens, vocabulary)), axis=1)
    return TokenSpan(
        offset=offset,
        token_ids=token_ids,
        candidate_ids=order[:, :k].astype(np.int32),
        event_mask=None,
    )


def open_message(name: str, **changes: Any) -> pb.SessionRequest:
    fields: dict[str, Any] = {
        "prompt_ids": codec.encode_ids(PROMPT),
        "options": codec.encode_options(OPTIONS),
        "policy": codec.encode_policy(POLICY),
    }
    return pb.SessionRequest(open=pb.Open(session_id=name, **(fields | changes)))


def append_message(name: str, span: TokenSpan, deadline_ms: int = 0) -> pb.SessionRequest:
    append = pb.Append(session_id=name, span=codec.encode_span(span), deadline_ms=deadline_ms)
    return pb.SessionRequest(append=append)


def hello(
    run_id: str = "test", credit_bytes: int = 0, *, accepts_batches: bool = False
) -> pb.SessionRequest:
    message = pb.Hello(
        protocol_version=1,
        run_id=run_id,
        credit_bytes=credit_bytes,
        accepts_batches=accepts_batches,
    )
    return pb.SessionRequest(hello=message)


def batch_of(messages: list[pb.SessionRequest]) -> bytes:
    """For SessionRequest.batch."""
    batch = pb.RequestBatch(requests=[message.SerializeToString() for message in messages])
    return batch.SerializeToString()


async def answered(read: Callable[[], Awaitable[Any]], number: int) -> None:
    """Reads so many answers, however they were batched; every one must be a good one."""
    while number:
        reply = await read()
        for answer, _ in decode_responses(reply.SerializeToString()):
            assert answer.WhichOneof("message") in ("opened", "scores", "closed"), answer
            number -= 1


@asynccontextmanager
async def stub_at(address: str) -> AsyncIterator[Any]:
    options = [*codec.CHANNEL_LIMITS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield pb_grpc.TeacherServiceStub(channel)  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class BusyStream:
    """A stream whose sessions append again as soon as they are answered, until GoAway."""

    num_sessions: int
    tokens: int = 4
    sent: int = 0
    answered: int = 0
    refused: int = 0
    went_away_at: float = 0.0
    ended_with: TeacherError | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    welcomed: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, stub: Any) -> None:
        """Returns when the server has ended the stream."""
        call = stub.Session()
        await call.write(hello())
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                await self._react(call, message)
        except grpc.aio.AioRpcError as error:
            self.ended_with = decode_status(error)
        finally:
            call.cancel()

    async def _react(self, call: Any, message: pb.SessionResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "welcome":
            for index in range(self.num_sessions):
                await call.write(open_message(f"{id(self)}-{index}"))
        elif kind == "opened":
            await self._append(call, message.opened.session_id)
        elif kind == "scores" and message.scores.last:
            self.answered += 1
            self.offsets[message.scores.session_id] += self.tokens
            self.welcomed.set()
            await self._append(call, message.scores.session_id)
        elif kind == "error":
            self.refused += 1
        elif kind == "go_away":
            self.went_away_at = time.monotonic()

    async def _append(self, call: Any, name: str) -> None:
        if self.went_away_at:
            return
        self.sent += 1
        offset = self.offsets.setdefault(name, 0)
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(append_message(name, span_at(offset, self.tokens)))


class HealthLog:
    """What a Watch stream tells, with the times."""

    def __init__(self, service: str = SERVICE) -> None:
        self.service = service
        self.changes: list[tuple[float, int]] = []

    async def follow(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service=self.service)
            with suppress(grpc.aio.AioRpcError):
                async for reply in health_pb2_grpc.HealthStub(channel).Watch(request):
                    self.changes.append((time.monotonic(), reply.status))

    @property
    def statuses(self) -> list[int]:
        return [status for _, status in self.changes]

    async def until(self, statuses: list[int]) -> float:
        """Waits for exactly these statuses so far; returns when the last one came."""
        try:
            await eventually(lambda: self.statuses == statuses)
        except AssertionError as error:
            raise AssertionError(f"{self.statuses}, not {statuses}") from error
        return self.changes[-1][0]
