"""The gRPC servicer: decodes, calls, encodes. No thresholds of its own, no model, no engine.

Every RPC passes through one edge that turns a TeacherError into the status of the call, counts it,
and keeps everything unexpected in the server's log. Errors of a single session are answered inside
its stream instead (teacher_server/rpc/stream.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from teacher_server import logs
from teacher_server.access.caller import UNAUTHENTICATED_GRPC_TENANT, Caller, TenantOf
from teacher_server.metrics.server import Metrics
from teacher_server.metrics.tallies import MessageTally
from teacher_server.rpc.interceptors import Context, authorization_of, certificate_name_of
from teacher_server.rpc.stream import SessionStream, StreamLimits, seen
from teacher_server.scoring.sessions import SessionTable
from teacher_wire import batches, codec
from teacher_wire.codec import SERVICE_NAME
from teacher_wire.errors import (
    EngineError,
    FingerprintMismatchError,
    InvalidRequestError,
    NotReadyError,
    SlowConsumerError,
    TeacherError,
    UnauthenticatedError,
    code_of,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import PROTOCOL_VERSION, Scores, TeacherInfo
from teacher_wire.status import encode_status
from teacher_wire.vocabulary import MAX_TOKENS_ASKED, Vocabulary

log = logging.getLogger(__name__)
MAX_RUN_ID_BYTES = 256
_CUT_S = 0.3
"""Time for calls that are cut to say so."""


def add_to_server(service: TeacherService, server: grpc.aio.Server) -> None:
    """Registers the service. Bytes that are no message reach it as None, and those of a stream as
    they are: grpc.aio would answer them with UNKNOWN and the text of a Python exception.
    """
    handlers = {
        "GetInfo": grpc.unary_unary_rpc_method_handler(
            service.GetInfo,
            request_deserializer=_reader(pb.GetInfoRequest),
            response_serializer=pb.GetInfoResponse.SerializeToString,
        ),
        "GetTokens": grpc.unary_unary_rpc_method_handler(
            service.GetTokens,
            request_deserializer=_reader(pb.GetTokensRequest),
            response_serializer=pb.GetTokensResponse.SerializeToString,
        ),
        "Score": grpc.unary_stream_rpc_method_handler(
            service.Score,
            request_deserializer=_reader(pb.ScoreRequest),
            response_serializer=pb.ScoreResponse.SerializeToString,
        ),
        "Session": grpc.stream_stream_rpc_method_handler(service.Session),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _reader(kind: Any) -> Callable[[bytes], Any]:
    def read(raw: bytes) -> Any:
        try:
            return kind.FromString(raw)
        except DecodeError:
            return None

    return read


def _refuse_unreadable(request: Any) -> None:
    if request is None:
        raise InvalidRequestError("the request cannot be read: it is not of this contract")


class TeacherService:
    """opd.teacher.v1.TeacherService over a session table."""

    def __init__(
        self,
        info: TeacherInfo,
        sessions: SessionTable,
        *,
        metrics: Metrics,
        ready: Callable[[], bool],
        limits: StreamLimits,
        tenant_of: TenantOf,
        vocabulary: Vocabulary,
    ) -> None:
        """While `ready` is False every scoring call is refused with NotReadyError."""
        self._vocabulary = vocabulary
        self._tenant_of = tenant_of
        self._info = info
        self._sessions = sessions
        self._metrics = metrics
        self._ready = ready
        self._limits = limits
        self._tallies = {
            name: metrics.messages(_full_name(name))
            for name in ("GetInfo", "GetTokens", "Score", "Session")
        }
        self._streams: dict[SessionStream, Callable[[], None]] = {}
        """Each with the question whether its caller may still call."""
        self._draining = False
        self._num_busy = 0
        """Calls with work of their own; a stream that has not said Hello has none."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut = asyncio.Event()

    @property
    def send_queue_bytes(self) -> int:
        """Replies that clients have not accepted yet, over all streams."""
        return sum(stream.num_reply_bytes for stream in self._streams)

    async def drain(self, reason: str, deadline_s: float) -> bool:
        """Takes no new calls and ends all in good order. Those still busy after deadline_s end with
        NotReadyError, so that what they are owed can be asked for elsewhere; then it returns False.
        """
        self._draining = True
        for stream in list(self._streams):
            stream.drain(reason, int(deadline_s * 1000))
        if await self._idle_within(deadline_s):
            return True
        self._cut.set()
        for stream in list(self._streams):
            stream.cut(_cut_error())
        await self._idle_within(_CUT_S)
        return False

    async def _idle_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._idle.wait()
        return False

    def recheck(self) -> None:
        """Ends the streams of callers that may not call any more: tokens expire and are revoked."""
        for stream, check in list(self._streams.items()):
            try:
                check()
            except TeacherError as error:
                stream.cut(error)

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        async with self._edge("GetInfo", context) as tally:
            tally.received += 1
            _refuse_unreadable(request)
            tally.sent += 1
            return pb.GetInfoResponse(info=codec.encode_info(self._info))

    async def GetTokens(
        self, request: pb.GetTokensRequest, context: Context
    ) -> pb.GetTokensResponse:
        async with self._edge("GetTokens", context) as tally:
            tally.received += 1
            _refuse_unreadable(request)
            if not 1 <= request.count <= MAX_TOKENS_ASKED:
                raise InvalidRequestError(
                    f"count is {request.count}, must be in 1..{MAX_TOKENS_ASKED}"
                )
            named = self._vocabulary.named(request.first_id, request.count)
            tally.sent += 1
            return pb.GetTokensResponse(ids=named, tokens=named.values())

    async def Score(self, request: pb.ScoreRequest, context: Context) -> None:
        async with self._edge("Score", context) as tally:
            tally.received += 1
            _refuse_unreadable(request)
            self._refuse_unless_ready()
            options = codec.decode_options(request.options)
            tenant = self._tenant(context, request.run_id)
            logs.tenant.set(tenant)
            work = self._sessions.score_once(
                codec.decode_ids(request.prompt_ids, "prompt_ids"),
                codec.decode_span(request.span),
                options,
                codec.decode_policy(request),
                tenant=tenant,
                deadline_s=context.time_remaining(),
            )
            with self._busy():
                scores = await self._unless_cut(work)
            for chunk in codec.encode_score_responses(scores, options.logprob_dtype):
                await self._write_in_time(context, chunk)
                tally.sent += 1

    async def Session(self, request_iterator: AsyncIterator[bytes], context: Context) -> None:
        async with self._edge("Session", context) as tally:
            # Hello is read first in any case: grpc.aio's client forgets a status that arrives
            # while it is still writing.
            reading = asyncio.ensure_future(_first(request_iterator))
            reading.add_done_callback(seen)
            # Shielded: cancelling a pending read leaks memory in grpc.aio.
            first = await asyncio.shield(reading)
            if first is None:
                return
            tally.received += 1
            self._refuse_unless_ready()
            if not first.HasField("hello"):
                kind = first.WhichOneof("message")
                raise InvalidRequestError(f"the first message is {kind}, must be hello")
            hello = first.hello
            check_hello(hello, self._info)
            tenant = self._tenant(context, hello.run_id)
            logs.tenant.set(tenant)
            log.info("a stream begins")
            stream = SessionStream(
                context,
                self._sessions,
                tenant=tenant,
                credit_bytes=hello.credit_bytes,
                accepts_batches=hello.accepts_batches,
                limits=self._limits,
                metrics=self._metrics,
                tally=tally,
            )
            self._streams[stream] = lambda: self._check(context, hello.run_id, tenant)
            try:
                with self._busy():
                    await stream.run(request_iterator, codec.encode_info(self._info))
            finally:
                del self._streams[stream]
                log.info("a stream ends")

    def _tenant(self, context: Context, run_id: str) -> str:
        return self._tenant_of(
            Caller(
                authorization=authorization_of(context.invocation_metadata()),
                certificate_name=certificate_name_of(context),
                claimed=claimed_tenant(run_id),
            )
        )

    def _check(self, context: Context, run_id: str, tenant: str) -> None:
        if self._tenant(context, run_id) != tenant:
            raise UnauthenticatedError("the credentials now stand for another tenant")

    async def _write_in_time(self, context: Context, chunk: pb.ScoreResponse) -> None:
        limit_s = self._limits.slow_client_s
        # The write is left alone: cancelling a pending one leaks memory in grpc.aio.
        writing = asyncio.ensure_future(context.write(chunk))
        done, _ = await asyncio.wait({writing}, timeout=limit_s)
        if not done:
            writing.add_done_callback(seen)
            self._metrics.slow_stream()
            raise SlowConsumerError(f"a reply was not accepted within {limit_s} s")
        writing.result()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._num_busy += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_busy -= 1
            if not self._num_busy:
                self._idle.set()

    async def _unless_cut(self, work: Coroutine[Any, Any, Scores]) -> Scores:
        working = asyncio.create_task(work)
        cut = asyncio.create_task(self._cut.wait())
        try:
            await asyncio.wait({working, cut}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _cut_error()
            return working.result()
        finally:
            cut.cancel()
            working.cancel()

    def _refuse_unless_ready(self) -> None:
        if self._draining or not self._ready():
            raise NotReadyError("the server is loading or draining", retry_after_ms=1000)

    @asynccontextmanager
    async def _edge(self, name: str, context: Context) -> AsyncIterator[MessageTally]:
        method, started = _full_name(name), time.monotonic()
        code = grpc.StatusCode.OK
        logs.request_id.set(uuid.uuid4().hex)
        self._metrics.rpc_started(method)
        try:
            yield self._tallies[name]
        except TeacherError as error:
            code = code_of(error).grpc
            self._metrics.error(type(error).__name__)
            await context.abort_with_status(encode_status(error))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            code = grpc.StatusCode.INTERNAL
            self._metrics.error(EngineError.__name__)
            log.exception("%s failed", method)
            hidden = EngineError(
                f"the server failed on this call; see its log, request {logs.request_id.get()}"
            )
            await context.abort_with_status(encode_status(hidden))
            raise AssertionError("abort raises") from error
        finally:
            self._metrics.rpc(method, code, time.monotonic() - started)


async def _first(requests: AsyncIterator[bytes]) -> pb.SessionRequest | None:
    raw = await anext(aiter(requests), None)
    return None if raw is None else batches.decode_request(raw)


def _full_name(method: str) -> str:
    return f"/{SERVICE_NAME}/{method}"


def _cut_error() -> NotReadyError:
    return NotReadyError("the server ended before it had answered: ask elsewhere, or later")


def claimed_tenant(run_id: str) -> str:
    """Whose share a call counts against where nobody is authenticated."""
    size = len(run_id.encode())
    if size > MAX_RUN_ID_BYTES:
        raise InvalidRequestError(f"run_id has {size} bytes, the limit is {MAX_RUN_ID_BYTES}")
    return run_id or UNAUTHENTICATED_GRPC_TENANT


def check_hello(hello: pb.Hello, info: TeacherInfo) -> None:
    """Client and server speak the same contract about the same tokens."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise FingerprintMismatchError(
            f"protocol_version is {hello.protocol_version}, the server speaks {PROTOCOL_VERSION}"
        )
    fingerprint = hello.tokenizer_fingerprint
    if fingerprint and fingerprint != info.tokenizer_fingerprint:
        raise FingerprintMismatchError(
            f"the tokenizer is another one than that of the teacher's model {info.model_id}: "
            f"tokenizer_fingerprint is {fingerprint}, the teacher's is "
            f"{info.tokenizer_fingerprint}; GetTokens tells what each id means"
        )
    if hello.vocab_size and hello.vocab_size != info.vocab_size:
        raise FingerprintMismatchError(
            f"vocab_size is {hello.vocab_size}, the teacher's is {info.vocab_size}"
        )
