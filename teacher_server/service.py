"""The gRPC servicer: decodes, calls, encodes. No thresholds of its own, no model, no engine.

Every RPC passes through one edge that turns a TeacherError into the status of the call, counts it,
and keeps everything unexpected in the server's log. Errors of a single session are answered inside
its stream instead (teacher_server/stream.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import grpc

from teacher_server.interceptors import authorization_of, certificate_name_of
from teacher_server.sessions import SessionTable
from teacher_server.stream import Context, SessionStream, StreamLimits
from teacher_wire import codec
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
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import PROTOCOL_VERSION, TeacherInfo
from teacher_wire.status import encode_status

log = logging.getLogger(__name__)
SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
DEFAULT_TENANT = "default"
MAX_RUN_ID_BYTES = 256
TenantOf = Callable[[Sequence[str], str | None, str], str]
"""Authorization headers, common name of the certificate, run_id -> tenant; raises TeacherError."""


class ServiceMetrics(Protocol):
    """What the service reports; teacher_server.metrics.Metrics."""

    def error(self, type_name: str) -> None: ...

    def dropped(self, reason: str) -> None: ...

    def rpc_started(self, method: str) -> None: ...

    def rpc(self, method: str, code: str | grpc.StatusCode, seconds: float) -> None: ...


class TeacherService(pb_grpc.TeacherServiceServicer):
    """opd.teacher.v1.TeacherService over a session table."""

    def __init__(
        self,
        info: TeacherInfo,
        sessions: SessionTable,
        *,
        metrics: ServiceMetrics,
        ready: Callable[[], bool] = lambda: True,
        limits: StreamLimits | None = None,
        caller: TenantOf = lambda _authorization, _certificate_name, run_id: run_id,
    ) -> None:
        """While `ready` is False every scoring call is refused with NotReadyError."""
        self._caller = caller
        self._info = info
        self._sessions = sessions
        self._metrics = metrics
        self._ready = ready
        self._limits = limits or StreamLimits()
        self._streams: dict[SessionStream, Callable[[], None]] = {}
        """Each with the question whether its caller may still call."""
        self._num_calls = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self, reason: str, deadline_s: float) -> bool:
        """Ends all streams in good order and takes no new ones; False when some were still busy
        after deadline_s."""
        self._draining = True
        for stream in list(self._streams):
            await stream.drain(reason, int(deadline_s * 1000))
        try:
            await asyncio.wait_for(self._idle.wait(), deadline_s)
        except TimeoutError:
            return False
        return True

    def recheck(self) -> None:
        """Ends the streams of callers that may not call any more: tokens expire and are revoked."""
        for stream, check in list(self._streams.items()):
            try:
                check()
            except TeacherError as error:
                stream.end(error)

    async def GetInfo(
        self,
        request: pb.GetInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetInfoRequest, pb.GetInfoResponse],
    ) -> pb.GetInfoResponse:
        async with self._edge("GetInfo", context):
            return pb.GetInfoResponse(info=codec.encode_info(self._info))

    async def Score(
        self,
        request: pb.ScoreRequest,
        context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse],
    ) -> None:
        async with self._edge("Score", context):
            self._refuse_unless_ready()
            options = codec.decode_options(request.options)
            scores = await self._sessions.score_once(
                codec.decode_ids(request.prompt_ids, "prompt_ids"),
                codec.decode_span(request.span),
                options,
                codec.decode_policy(request.policy),
                tenant=self._tenant(context, request.run_id),
                deadline_s=context.time_remaining(),
            )
            for chunk in codec.encode_score_responses(scores, options.logprob_dtype):
                await self._write_in_time(context, chunk)

    async def Session(
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Context
    ) -> None:
        async with self._edge("Session", context):
            # Hello is read first in any case: grpc.aio's client forgets a status that arrives
            # while it is still writing.
            first = await anext(aiter(request_iterator), None)
            if first is None:
                return
            self._refuse_unless_ready()
            if not first.HasField("hello"):
                kind = first.WhichOneof("message")
                raise InvalidRequestError(f"the first message is {kind}, must be hello")
            hello = first.hello
            check_hello(hello, self._info)
            tenant = self._tenant(context, hello.run_id)
            stream = SessionStream(
                context,
                self._sessions,
                tenant=tenant,
                credit_bytes=hello.credit_bytes,
                limits=self._limits,
                metrics=self._metrics,
            )
            self._streams[stream] = lambda: self._check(context, hello.run_id, tenant)
            try:
                await stream.run(request_iterator, codec.encode_info(self._info))
            finally:
                del self._streams[stream]

    def _tenant(self, context: grpc.aio.ServicerContext[Any, Any], run_id: str) -> str:
        authorization = authorization_of(context.invocation_metadata())
        return self._caller(authorization, certificate_name_of(context), tenant_of(run_id))

    def _check(self, context: grpc.aio.ServicerContext[Any, Any], run_id: str, tenant: str) -> None:
        if self._tenant(context, run_id) != tenant:
            raise UnauthenticatedError("the credentials now stand for another tenant")

    async def _write_in_time(
        self,
        context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse],
        chunk: pb.ScoreResponse,
    ) -> None:
        limit_s = self._limits.slow_client_s
        # The write is left alone: cancelling a pending one leaks memory in grpc.aio.
        writing = asyncio.ensure_future(context.write(chunk))
        done, _ = await asyncio.wait({writing}, timeout=limit_s)
        if not done:
            writing.add_done_callback(_seen)
            self._metrics.dropped("slow")
            raise SlowConsumerError(f"a reply was not accepted within {limit_s} s")
        writing.result()

    def _refuse_unless_ready(self) -> None:
        if self._draining or not self._ready():
            raise NotReadyError("the server is loading or draining", retry_after_ms=1000)

    @asynccontextmanager
    async def _edge(
        self, name: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[None]:
        method, started = f"/{SERVICE_NAME}/{name}", time.monotonic()
        code = grpc.StatusCode.OK
        self._metrics.rpc_started(method)
        self._num_calls += 1
        self._idle.clear()
        try:
            yield
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
            hidden = EngineError("the server failed on this call; see its log")
            await context.abort_with_status(encode_status(hidden))
            raise AssertionError("abort raises") from error
        finally:
            self._num_calls -= 1
            if not self._num_calls:
                self._idle.set()
            self._metrics.rpc(method, code, time.monotonic() - started)


def _seen(writing: asyncio.Future[None]) -> None:
    """A write that fails after its call has ended is nobody's error."""
    if not writing.cancelled():
        writing.exception()


def tenant_of(run_id: str) -> str:
    """Whose share a call counts against where nobody is authenticated."""
    size = len(run_id.encode())
    if size > MAX_RUN_ID_BYTES:
        raise InvalidRequestError(f"run_id has {size} bytes, the limit is {MAX_RUN_ID_BYTES}")
    return run_id or DEFAULT_TENANT


def check_hello(hello: pb.Hello, info: TeacherInfo) -> None:
    """Client and server speak the same contract about the same tokens."""
    if hello.protocol_version != PROTOCOL_VERSION:
        raise FingerprintMismatchError(
            f"protocol_version is {hello.protocol_version}, the server speaks {PROTOCOL_VERSION}"
        )
    fingerprint = hello.tokenizer_fingerprint
    if fingerprint and fingerprint != info.tokenizer_fingerprint:
        raise FingerprintMismatchError(
            f"tokenizer_fingerprint is {fingerprint}, the teacher's is {info.tokenizer_fingerprint}"
        )
    if hello.vocab_size and hello.vocab_size != info.vocab_size:
        raise FingerprintMismatchError(
            f"vocab_size is {hello.vocab_size}, the teacher's is {info.vocab_size}"
        )
