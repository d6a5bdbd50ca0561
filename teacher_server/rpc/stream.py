"""One Session stream: many sessions side by side, each with its messages in order.

A lane holds the messages of one session and one task that carries them out; a session without
messages has no task. Reading and writing are tasks of their own, so that a client that does not
read can still send Credit and Close. Errors of a session are answered in-band and the stream lives
on.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from teacher_server import logs
from teacher_server.metrics.server import Metrics
from teacher_server.metrics.tallies import MessageTally
from teacher_server.rpc.interceptors import Context
from teacher_server.rpc.replies import ReplyQueue, answer_bytes
from teacher_server.scoring.sessions import SessionTable
from teacher_wire import batches, codec, tracing
from teacher_wire.errors import (
    EngineError,
    InvalidRequestError,
    NotReadyError,
    QuotaError,
    SlowConsumerError,
    TeacherError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.status import encode_error

log = logging.getLogger(__name__)
_BREAK_S = 0.05
_REQUEST_OVERHEAD_BYTES = 512
"""What a waiting request costs beyond its own size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """What one stream may hold on the server."""

    max_reply_bytes: int = 8 << 20
    """Replies waiting to be sent."""
    max_request_bytes: int = 64 << 20
    """Requests waiting to be carried out."""
    slow_client_s: float = 30.0
    """A client that takes longer to accept a reply, or to grant credit for it, is cut off."""


@dataclass(slots=True, eq=False)
class _Request:
    """A message of a session, waiting."""

    kind: str
    """open, append or close."""
    message: pb.SessionRequest
    size: int
    """Bytes it counts with."""
    arrived: float
    """Its deadline counts from this time of the loop."""


@dataclass(slots=True, eq=False)
class _Lane:
    """The messages of one session, and the task that carries them out."""

    requests: deque[_Request] = field(default_factory=deque)
    task: asyncio.Task[None] | None = None


class SessionStream:
    """Serves one stream after its handshake."""

    def __init__(
        self,
        context: Context,
        sessions: SessionTable,
        *,
        tenant: str,
        credit_bytes: int,
        accepts_batches: bool,
        limits: StreamLimits,
        metrics: Metrics,
        tally: MessageTally,
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._tenant = tenant
        self._limits = limits
        self._metrics = metrics
        self._tally = tally
        self._replies = ReplyQueue(
            max_bytes=limits.max_reply_bytes, credit_bytes=credit_bytes, batches=accepts_batches
        )
        self._lanes: dict[str, _Lane] = {}
        self._opened: set[str] = set()
        self._request_bytes = 0
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._draining = False
        self._stopped = False
        self._reading = True
        """A read is pending in gRPC."""
        self._writing = False
        """A write is."""
        self._helpers: set[asyncio.Task[None]] = set()

    async def run(self, requests: AsyncIterator[bytes], info: pb.TeacherInfo) -> None:
        """Serves until the client is done, the stream breaks, or it is drained.

        Raises SlowConsumerError for a client that is too slow, QuotaError for one that asks too
        much. When the client ends the stream its sessions end with it; when the stream breaks they
        stay a while, to be resumed.
        """
        welcome = pb.Welcome(info=info, accepts_batches=True)
        await self._replies.put(pb.SessionResponse(welcome=welcome))
        reader = self._start(self._read(requests))
        writer = self._start(self._write())
        try:
            await self._until(reader, writer)
            if reader.done():
                await self._until(self._start(self._settle()), writer)
                if self._opened:
                    # A connection that breaks ends the requests too, and cancels a moment later.
                    await asyncio.sleep(_BREAK_S)
                for session_id in self._opened:
                    self._sessions.close(session_id, tenant=self._tenant, owner=self)
        finally:
            self._sessions.detach(self._opened, tenant=self._tenant, owner=self)
            await self._stop(reader, writer)

    async def _stop(self, reader: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """Ends all tasks, but for a read or a write that is pending in gRPC: those end by
        themselves with the call, and cancelling one leaks memory in grpc.aio."""
        self._stopped = True
        left_alone = {reader} if self._reading else set()
        if self._writing:
            left_alone.add(writer)
        lanes = {lane.task for lane in self._lanes.values() if lane.task}
        tasks = (self._helpers | lanes) - left_alone
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_reply_bytes(self) -> int:
        """Replies that the client has not accepted yet."""
        return self._replies.num_bytes

    def drain(self, reason: str, deadline_ms: int) -> None:
        """Tells the client to go elsewhere, answers what it has sent, then ends the stream."""
        if not self._draining:
            self._draining = True
            go_away = pb.GoAway(reason=reason, deadline_ms=deadline_ms)
            self._replies.put_first(pb.SessionResponse(go_away=go_away))
            self._start(self._end_when_settled())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _start(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._helpers.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Lets go of it: its traceback leads back here, which only the collector could undo."""
        self._helpers.discard(task)
        seen(task)

    async def _until(self, wanted: asyncio.Task[None], writer: asyncio.Task[None]) -> None:
        """Returns when `wanted` or the stream is over; raises what broke it."""
        await asyncio.wait({wanted, writer, self._over}, return_when=asyncio.FIRST_COMPLETED)
        for task in (self._over, writer, wanted):
            if task.done():
                return task.result()

    async def _settle(self) -> None:
        """Returns when every request so far has been answered and every answer sent."""
        while self._lanes:
            await asyncio.wait([lane.task for lane in self._lanes.values() if lane.task])
        await self._replies.flushed()

    async def _end_when_settled(self) -> None:
        await self._settle()
        if not self._over.done():
            self._over.set_result(None)

    def cut(self, error: TeacherError) -> None:
        """Ends the stream now, with this error; its sessions stay."""
        if not self._over.done():
            if isinstance(error, SlowConsumerError):
                self._metrics.slow_stream()
            self._over.set_exception(error)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        limit_s = self._limits.slow_client_s
        slow = SlowConsumerError(
            f"a reply was not accepted within {limit_s} s: the client is too slow"
        )
        while True:
            await self._replies.wait_for_reply()
            # A timer, not asyncio.timeout: cancelling a pending write leaks memory in grpc.aio.
            timer = loop.call_later(limit_s, self.cut, slow)
            try:
                replies = await self._replies.take()
                self._writing = True
                await self._context.write(batches.encode_responses(replies))
            finally:
                self._writing = False
                timer.cancel()
            self._replies.written()
            self._tally.sent += 1

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for raw in requests:
            if self._stopped:
                continue
            self._tally.received += 1
            self._reading = False
            try:
                for request, size in batches.decode_requests(raw):
                    await self._take_in(request, size)
            except InvalidRequestError as error:
                await self._answer_error(error, "", None)
            self._reading = True

    async def _take_in(self, request: pb.SessionRequest, size: int) -> None:
        kind = request.WhichOneof("message")
        if kind == "credit":
            self._replies.grant(request.credit.bytes)
        elif kind in ("open", "append", "close"):
            self._enqueue(kind, request, size + _REQUEST_OVERHEAD_BYTES)
        else:
            got = kind or "empty or unreadable"
            error = InvalidRequestError(f"message is {got}, must be open, append, close, credit")
            await self._answer_error(error, "", None)

    def _enqueue(self, kind: str, request: pb.SessionRequest, size: int) -> None:
        self._request_bytes += size
        if self._request_bytes > self._limits.max_request_bytes:
            limit = self._limits.max_request_bytes
            self.cut(QuotaError(f"unanswered requests pass the limit of {limit} bytes"))
            return
        session_id = getattr(request, kind).session_id
        lane = self._lanes.get(session_id)
        if lane is None:
            lane = self._lanes[session_id] = _Lane()
        lane.requests.append(_Request(kind, request, size, self._now()))
        if lane.task is None:
            lane.task = asyncio.create_task(self._run_lane(session_id, lane))

    async def _run_lane(self, session_id: str, lane: _Lane) -> None:
        logs.session.set(session_id)
        while lane.requests:
            request = lane.requests.popleft()
            self._request_bytes -= request.size
            try:
                await self._carry_out(request)
            except TeacherError as error:
                await self._answer_error(error, session_id, _offset(request))
            except Exception:
                log.exception("an %s failed", request.kind)
                hidden = EngineError("the server failed on this request; see its log")
                await self._answer_error(hidden, session_id, _offset(request))
        del self._lanes[session_id]

    async def _carry_out(self, request: _Request) -> None:
        message = request.message
        if request.kind == "open":
            await self._replies.put(pb.SessionResponse(opened=self._open(message.open)))
        elif request.kind == "append":
            await self._append(message.append, request.arrived)
        else:
            session_id = message.close.session_id
            self._sessions.close(session_id, tenant=self._tenant)
            self._opened.discard(session_id)
            await self._replies.put(pb.SessionResponse(closed=pb.Closed(session_id=session_id)))

    def _open(self, request: pb.Open) -> pb.Opened:
        if self._draining:
            raise NotReadyError("the server is draining: open the session elsewhere")
        next_offset = self._sessions.open(
            request.session_id,
            codec.decode_ids(request.prompt_ids, "prompt_ids"),
            codec.decode_options(request.options),
            codec.decode_policy(request),
            tenant=self._tenant,
            owner=self,
            scored_ids=codec.decode_ids(request.scored_ids, "scored_ids"),
            drift_state=codec.decode_drift(request.drift) if request.HasField("drift") else None,
        )
        self._opened.add(request.session_id)
        return pb.Opened(session_id=request.session_id, next_offset=next_offset)

    async def _append(self, request: pb.Append, arrived: float) -> None:
        session_id = request.session_id
        options = self._sessions.options_of(session_id, tenant=self._tenant)
        span, parent = codec.decode_span(request.span), request.traceparent
        if parent:
            logs.trace_id.set(tracing.trace_id_of(parent))
        deadline_ms = request.deadline_ms
        async with self._replies.room_for(answer_bytes(span, options)):
            left_s = deadline_ms / 1000 - (self._now() - arrived) if deadline_ms else None
            with tracing.append_span(parent, len(span)) as trace:
                scores = await self._sessions.append(
                    session_id, span, tenant=self._tenant, deadline_s=left_s
                )
                trace.scored(scores.timing)
        for reply in codec.encode_scores(scores, options.logprob_dtype, session_id):
            await self._replies.put(reply)

    async def _answer_error(self, error: TeacherError, session_id: str, offset: int | None) -> None:
        self._metrics.error(type(error).__name__)
        message = encode_error(error, session_id, offset)
        await self._replies.put(pb.SessionResponse(error=message))


def seen(task: asyncio.Future[Any]) -> None:
    """A read or write that fails after its call has ended is nobody's error."""
    if not task.cancelled():
        task.exception()


def _offset(request: _Request) -> int | None:
    return request.message.append.span.offset if request.kind == "append" else None
