"""The replies of one stream on their way out: bounded in bytes, paced by the client's credit. Those
that are ready at the same moment leave as one message, if the client accepts that.

A put waits while the queue is full, so a client that does not read stops its own sessions and
nobody else's. Room for scores is reserved before the engine makes them, or each of a thousand
sessions of such a client could still hold one answer. Scores wait for credit; what is behind them
waits too, because answers keep their order.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from teacher_wire.batches import MAX_BATCH_BYTES, MAX_BATCH_MESSAGES
from teacher_wire.codec import ENVELOPE_BYTES, row_bytes
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import ScoreOptions, TokenSpan


def answer_bytes(span: TokenSpan, options: ScoreOptions) -> int:
    """Bytes of the scores of a span, within a few per cent."""
    num_candidates = 0 if span.candidate_ids is None else span.candidate_ids.shape[1]
    per_row = row_bytes(options.k, num_candidates, options.logprob_dtype)
    return len(span) * per_row + ENVELOPE_BYTES


class _Reply(NamedTuple):
    """Encoded, since a queue is bounded by what it holds."""

    raw: bytes
    paced: bool
    """Waits for credit."""


class ReplyQueue:
    """Replies in order, for one writer and many producers."""

    def __init__(self, *, max_bytes: int, credit_bytes: int, batches: bool) -> None:
        """`credit_bytes` may be sent in Scores before the first grant; 0 means without limit. With
        `batches` several replies may be taken at once."""
        self._max_bytes = max_bytes
        self._max_taken = MAX_BATCH_MESSAGES if batches else 1
        self._credit = credit_bytes
        self._paced = credit_bytes > 0
        self._replies: deque[_Reply] = deque()
        self._bytes = 0
        self._writing = 0
        self._reserved = 0
        self._waiting: list[asyncio.Future[None]] = []
        """Resolved at the next change; everything runs on one loop, so there is nothing to lock."""

    @property
    def num_bytes(self) -> int:
        """Bytes queued or being written."""
        return self._bytes

    @asynccontextmanager
    async def room_for(self, num_bytes: int) -> AsyncIterator[None]:
        """Keeps room for an answer that is being made; an empty queue has room for any. Inside,
        nothing but making it; what follows without a pause finds the room free."""
        while self._bytes + self._reserved and (
            self._bytes + self._reserved + num_bytes > self._max_bytes
        ):
            await self._change()
        self._reserved += num_bytes
        try:
            yield
        finally:
            self._reserved -= num_bytes
            self._changed()

    async def put(self, reply: pb.SessionResponse) -> None:
        """Adds a reply at the end, as soon as there is room; an empty queue takes any."""
        encoded = self._encoded(reply)
        size = len(encoded.raw)
        while self._bytes and self._bytes + size > self._max_bytes:
            await self._change()
        self._replies.append(encoded)
        self._bytes += size
        self._changed()

    def put_first(self, reply: pb.SessionResponse) -> None:
        """Adds a reply that overtakes all others and waits for nothing."""
        encoded = self._encoded(reply)
        self._replies.appendleft(encoded)
        self._bytes += len(encoded.raw)
        self._changed()

    def grant(self, num_bytes: int) -> None:
        """Adds to the client's credit."""
        self._credit += num_bytes
        self._changed()

    async def wait_for_reply(self) -> None:
        """Returns when there is a reply, whether or not there is credit for it."""
        while not self._replies:
            await self._change()

    async def take(self) -> list[bytes]:
        """The next reply as soon as credit allows, and those behind it that fit into one message;
        `written` must follow."""
        while not self._may_send():
            await self._change()
        taken = [self._next()]
        while len(taken) < self._max_taken and self._may_send() and self._fits():
            taken.append(self._next())
        return taken

    def _next(self) -> bytes:
        raw, paced = self._replies.popleft()
        if paced:
            self._credit -= len(raw)
        self._writing += len(raw)
        return raw

    def _may_send(self) -> bool:
        if not self._replies:
            return False
        return self._credit > 0 or not self._replies[0].paced

    def _fits(self) -> bool:
        return self._writing + len(self._replies[0].raw) <= MAX_BATCH_BYTES

    def _encoded(self, reply: pb.SessionResponse) -> _Reply:
        return _Reply(reply.SerializeToString(), self._paced and reply.HasField("scores"))

    def written(self) -> None:
        """The replies taken last are on their way, and their room is free."""
        self._bytes -= self._writing
        self._writing = 0
        self._changed()

    async def flushed(self) -> None:
        """Returns when every reply has been written."""
        while self._bytes:
            await self._change()

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        await waiter

    def _changed(self) -> None:
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
