"""One connection to one teacher: a Session stream that carries many sessions. No torch, no retries.

One task reads, one writes; callers wait on futures. Nothing here puts a timeout around a stream
read, and there are no client interceptors: both leak in grpc.aio.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from teacher_client.access import TeacherAccess
from teacher_client.outbox import Outbox
from teacher_client.retry import BrokenStreamError
from teacher_wire import batches, codec
from teacher_wire.errors import EngineError, NotReadyError, TeacherError
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.pb import teacher_pb2_grpc as pb_grpc
from teacher_wire.records import PROTOCOL_VERSION, TeacherInfo
from teacher_wire.status import decode_error, decode_status

log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *codec.CHANNEL_LIMITS,
    *codec.KEEPALIVE,
    ("grpc.http2.max_pings_without_data", 0),
    # Else channels to one address share a connection, and a new one inherits the pause after a
    # failure of the old one.
    ("grpc.use_local_subchannel_pool", 1),
)
_CLOSE_TIMEOUT_S = 2.0
_TOKENS_TIMEOUT_S = 30.0
_SESSION = f"/{codec.SERVICE_NAME}/Session"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handshake:
    """What a trainer says of itself before any work."""

    tokenizer_fingerprint: str
    vocab_size: int
    run_id: str
    credit_bytes: int = 32 << 20
    """Bytes of scores that may be on their way to this trainer."""
    access: TeacherAccess = field(default_factory=TeacherAccess)


@dataclass(slots=True, eq=False)
class _Exchange:
    """Requests of one session that wait for one answer each."""

    missing: int
    answer: asyncio.Future[list[pb.Scores]]
    chunks: list[pb.Scores] = field(default_factory=list)
    error: TeacherError | None = None


class TeacherStream:
    """A live stream; once broken it stays broken."""

    def __init__(self, endpoint: str, handshake: Handshake) -> None:
        self.endpoint = endpoint
        self.going_away = False
        """The server will end the stream soon."""
        self.broken: TeacherError | None = None
        """Why the stream ended."""
        self._unusable = asyncio.Event()
        self._handshake = handshake
        self._metadata = handshake.access.metadata()
        self._channel = handshake.access.channel(endpoint, CHANNEL_OPTIONS)
        self._stub = pb_grpc.TeacherServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._call: Any = None
        self._welcome: asyncio.Future[TeacherInfo] = asyncio.get_running_loop().create_future()
        self._outbox = Outbox()
        self._exchanges: dict[str, deque[_Exchange]] = {}
        self._num_calls = 0
        self._consumed_bytes = 0
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def connect(
        cls, endpoint: str, handshake: Handshake, timeout_s: float
    ) -> tuple[TeacherStream, TeacherInfo]:
        """A stream after its handshake, and what the server serves.

        Raises FingerprintMismatchError, UnauthenticatedError or PermissionDeniedError when the
        server refuses, NotReadyError when it is absent, loading or silent, ConfigError when a file
        of the access cannot be used.
        """
        stream = cls(endpoint, handshake)
        try:
            return stream, await stream._shake_hands(timeout_s)
        except BaseException:
            await stream.aclose()
            raise

    @property
    def usable(self) -> bool:
        """New work may be sent."""
        return self.broken is None and not self.going_away

    async def until_unusable(self) -> None:
        """Returns when the stream breaks or the server goes away."""
        await self._unusable.wait()

    @property
    def busy(self) -> bool:
        """Answers are still missing."""
        return bool(self._exchanges) or self._num_calls > 0

    async def _shake_hands(self, timeout_s: float) -> TeacherInfo:
        await self._wait_until_connected(timeout_s)
        # Bytes both ways: requests leave encoded, and replies count with the size they came in.
        self._call = self._channel.stream_stream(_SESSION)(metadata=self._metadata)
        hello = pb.Hello(
            protocol_version=PROTOCOL_VERSION,
            tokenizer_fingerprint=self._handshake.tokenizer_fingerprint,
            vocab_size=self._handshake.vocab_size,
            run_id=self._handshake.run_id,
            credit_bytes=self._handshake.credit_bytes,
            accepts_batches=True,
        )
        self._outbox.put(pb.SessionRequest(hello=hello).SerializeToString())
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        done, _ = await asyncio.wait({self._welcome}, timeout=timeout_s)
        if not done:
            raise NotReadyError(
                f"the teacher at {self.endpoint} did not answer Hello within {timeout_s:.1f} s"
            )
        return self._welcome.result()

    async def _wait_until_connected(self, timeout_s: float) -> None:
        """Fails at the first refused connection; how often to try again is the caller's choice."""
        give_up = asyncio.get_running_loop().time() + timeout_s
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise NotReadyError(await self._absence())
            try:
                async with asyncio.timeout_at(give_up):
                    await self._channel.wait_for_state_change(state)
            except TimeoutError:
                text = f"no teacher answers at {self.endpoint} within {timeout_s:.1f} s"
                raise NotReadyError(text) from None
            state = self._channel.get_state(try_to_connect=True)

    async def _absence(self) -> str:
        """Why there is no connection, in gRPC's words: the channel's state says nothing of TLS."""
        try:
            await self._stub.GetInfo(pb.GetInfoRequest(), timeout=1.0)
        except grpc.aio.AioRpcError as error:
            return f"no teacher listens at {self.endpoint}: {error.details()}"
        return f"no teacher listens at {self.endpoint}"

    async def exchange(self, session_id: str, requests: Sequence[bytes]) -> list[pb.Scores]:
        """Sends encoded SessionRequests of one session and waits for an answer to each; returns the
        scores.

        Raises the first error among the answers, or BrokenStreamError.
        """
        if self.broken is not None:
            raise BrokenStreamError(f"{self.endpoint}: {self.broken.message}")
        exchange = _Exchange(len(requests), asyncio.get_running_loop().create_future())
        # A caller that gives up leaves its exchange here, so that its answers are not taken for
        # those of the next one.
        self._exchanges.setdefault(session_id, deque()).append(exchange)
        for request in requests:
            self._outbox.put(request)
        return await exchange.answer

    async def score(self, request: pb.ScoreRequest) -> list[pb.ScoreResponse]:
        """The chunks of one Score call. Raises BrokenStreamError when the channel is closed."""
        with self._a_call():
            return [chunk async for chunk in self._stub.Score(request, metadata=self._metadata)]

    async def tokens(self, first_id: int, count: int) -> dict[int, str]:
        """Of a range of ids those that the teacher's tokenizer has a token for, with it."""
        request = pb.GetTokensRequest(first_id=first_id, count=count)
        with self._a_call():
            reply = await self._stub.GetTokens(
                request, metadata=self._metadata, timeout=_TOKENS_TIMEOUT_S
            )
        return dict(zip(reply.ids, reply.tokens, strict=True))

    @contextlib.contextmanager
    def _a_call(self) -> Iterator[None]:
        """Beside the stream, on the same channel."""
        self._num_calls += 1
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise decode_status(error) from error
        except asyncio.CancelledError:
            # Closing a channel cancels its calls, which must not look like a cancelled caller.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise BrokenStreamError(f"the channel to {self.endpoint} was closed") from None
        finally:
            self._num_calls -= 1

    async def aclose(self) -> None:
        """Ends the stream: in good order if the server follows at once, else by cancelling."""
        if self._tasks:
            self._outbox.end()
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        self._break(NotReadyError(f"the stream to {self.endpoint} was closed"))

    async def _write(self) -> None:
        # A write on a broken stream fails here as well; the reader has the reason.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while requests := await self._outbox.take():
                await self._call.write(batches.encode_requests(requests))
            await self._call.done_writing()

    async def _read(self) -> None:
        try:
            while (raw := await self._call.read()) is not grpc.aio.EOF:
                for message, size in batches.decode_responses(raw):
                    self._dispatch(message, size)
            self._break(NotReadyError(f"the teacher at {self.endpoint} ended the stream"))
        except grpc.aio.AioRpcError as error:
            reason = decode_status(error)
            if isinstance(reason, EngineError):
                # grpc.aio says INTERNAL of a stream that ends under a write, whatever its status.
                reason = NotReadyError(f"the stream to {self.endpoint} broke: {reason.message}")
            self._break(reason)
        except DecodeError:
            self._break(NotReadyError(f"{self.endpoint} sent what is no message of this contract"))
            self._call.cancel()
        except TeacherError as error:
            self._break(error)
            self._call.cancel()
        finally:
            # Whatever ended the reader, nobody may wait for it any more.
            self._break(NotReadyError(f"nothing reads from {self.endpoint} any more"))

    def _dispatch(self, message: pb.SessionResponse, size: int) -> None:
        kind = message.WhichOneof("message")
        if kind == "scores":
            self._count(size)
            self._answered(message.scores.session_id, chunk=message.scores)
        elif kind == "welcome":
            self._outbox.batches = message.welcome.accepts_batches
            self._welcome.set_result(codec.decode_info(message.welcome.info))
        elif kind == "go_away":
            log.info("%s goes away: %s", self.endpoint, message.go_away.reason)
            self.going_away = True
            self._unusable.set()
        elif kind == "opened":
            self._answered(message.opened.session_id)
        elif kind == "closed":
            self._answered(message.closed.session_id)
        elif kind == "error":
            error = decode_error(message.error)
            if not message.error.session_id:
                raise error
            self._answered(message.error.session_id, error=error)

    def _count(self, size: int) -> None:
        """Gives credit back in large steps, long before it runs out."""
        self._consumed_bytes += size
        if self._consumed_bytes * 4 >= self._handshake.credit_bytes:
            credit = pb.Credit(bytes=self._consumed_bytes)
            self._outbox.put(pb.SessionRequest(credit=credit).SerializeToString())
            self._consumed_bytes = 0

    def _answered(
        self, session_id: str, *, chunk: pb.Scores | None = None, error: TeacherError | None = None
    ) -> None:
        waiting = self._exchanges.get(session_id)
        if not waiting:
            log.warning("%s answered session %s unasked", self.endpoint, session_id)
            return
        exchange = waiting[0]
        exchange.error = exchange.error or error
        if chunk is not None:
            exchange.chunks.append(chunk)
            if not chunk.last:
                return
        exchange.missing -= 1
        if exchange.missing:
            return
        waiting.popleft()
        if not waiting:
            del self._exchanges[session_id]
        if exchange.answer.done():
            return
        if exchange.error is not None:
            exchange.answer.set_exception(exchange.error)
        else:
            exchange.answer.set_result(exchange.chunks)

    def _break(self, reason: TeacherError) -> None:
        if self.broken is not None:
            return
        self.broken = reason
        self._unusable.set()
        if not self._welcome.done():
            self._welcome.set_exception(reason)
            self._welcome.exception()  # seen: connect may have given up already
        for waiting in self._exchanges.values():
            for exchange in waiting:
                if not exchange.answer.done():
                    text = f"{self.endpoint}: {reason.message}"
                    exchange.answer.set_exception(BrokenStreamError(text))
        self._exchanges.clear()
