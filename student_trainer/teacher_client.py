"""The trainer's side of the contract: sessions that survive broken streams and restarted servers.
No torch.

A TeacherSession holds the truth of one response: prompt, scored tokens, drift. A server only
caches it. After a broken stream, a restart or an eviction the session is opened again with that
truth and the unanswered append is sent again; appends are idempotent, so no row is lost, repeated
or changed.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from student_trainer.patience import BrokenStreamError, Patience, RetryLimits, backoff_s
from student_trainer.teacher_stream import Handshake, TeacherStream
from teacher_wire import codec, tracing
from teacher_wire.errors import (
    CapacityError,
    FingerprintMismatchError,
    InvalidRequestError,
    NotReadyError,
    SessionOffsetError,
    TeacherError,
)
from teacher_wire.pb import teacher_pb2 as pb
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    Scores,
    TeacherInfo,
    TokenSpan,
)

log = logging.getLogger(__name__)

OnAbsent = Literal["error", "wait"]
"""What to do when every endpoint is gone in mid-run: fail after the connect timeout, or wait."""

_SAME_TEACHER = ("weights_digest", "dtype", "vocab_size", "tokenizer_fingerprint")
"""Two servers that differ in one of these give different rows."""
_SAME_NAME = ("model_id", "revision")
"""What stands for the weights of a teacher without a digest."""


class TeacherClient:
    """A trainer's connection to its teacher, over one of several endpoints of the same model."""

    def __init__(
        self,
        endpoints: Sequence[str],
        handshake: Handshake,
        *,
        connect_timeout_s: float,
        on_absent: OnAbsent,
        limits: RetryLimits,
    ) -> None:
        """Use `connect`."""
        if not endpoints:
            raise InvalidRequestError("endpoints is empty, must name at least one teacher")
        self._endpoints = list(endpoints)
        self._handshake = handshake
        self._connect_timeout_s = connect_timeout_s
        self._on_absent = on_absent
        self.limits = limits
        self._info: TeacherInfo | None = None
        self._stream: TeacherStream | None = None
        self._connecting: asyncio.Task[TeacherStream] | None = None
        self._next_endpoint = 0
        self._retiring: dict[asyncio.Task[None], TeacherStream] = {}
        self._closed = False

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[str],
        *,
        tokenizer_fingerprint: str,
        vocab_size: int,
        run_id: str,
        connect_timeout_s: float = 30.0,
        on_absent: OnAbsent = "error",
        credit_bytes: int = 32 << 20,
        limits: RetryLimits | None = None,
    ) -> TeacherClient:
        """A client after its first handshake.

        Raises FingerprintMismatchError when the teacher speaks of other tokens, NotReadyError
        naming the endpoints when none is ready within connect_timeout_s.
        """
        handshake = Handshake(
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            run_id=run_id,
            credit_bytes=credit_bytes,
        )
        client = cls(
            endpoints,
            handshake,
            connect_timeout_s=connect_timeout_s,
            on_absent=on_absent,
            limits=limits or RetryLimits(),
        )
        client._stream = await client._connect_any(connect_timeout_s)
        return client

    @property
    def info(self) -> TeacherInfo:
        """What the teacher serves."""
        if self._info is None:
            raise NotReadyError("the client is not connected")
        return self._info

    def open(
        self, prompt_ids: NDArray[np.int32], options: ScoreOptions, policy: DriftPolicy | None
    ) -> TeacherSession:
        """A session for one response; the server hears of it with the first append."""
        return TeacherSession(self, prompt_ids, options, policy)

    async def score(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
    ) -> Scores:
        """Scores one whole response."""
        request = pb.ScoreRequest(
            prompt_ids=codec.encode_ids(prompt_ids),
            span=codec.encode_span(span),
            options=codec.encode_options(options),
            policy=codec.encode_policy(policy),
            run_id=self._handshake.run_id,
        )
        patience = Patience(self.limits)
        while True:
            stream = await self.live_stream()
            try:
                return codec.decode_scores(await stream.score(request))
            except (TeacherError, BrokenStreamError) as error:
                await patience.after(error)

    async def aclose(self) -> None:
        """Ends the stream; the server drops the sessions that are still open."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._stream is not None:
            await self._stream.aclose()
        retiring = dict(self._retiring)
        await asyncio.gather(*(stream.aclose() for stream in retiring.values()))
        await asyncio.gather(*retiring, return_exceptions=True)

    async def live_stream(self) -> TeacherStream:
        """A usable stream: the one in use, or a new one to the first endpoint that answers.

        Raises NotReadyError when none answers in time, FingerprintMismatchError when a server
        that came back serves something else.
        """
        if self._closed:
            raise NotReadyError("the client is closed")
        if self._stream is not None and self._stream.usable:
            return self._stream
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.create_task(self._reconnect())
            self._connecting.add_done_callback(_seen)
        return await asyncio.shield(self._connecting)

    def live_stream_or_none(self) -> TeacherStream | None:
        """The stream in use, if it is usable without waiting."""
        usable = self._stream is not None and self._stream.usable and not self._closed
        return self._stream if usable else None

    async def _reconnect(self) -> TeacherStream:
        old, self._stream = self._stream, None
        if old is not None:
            self._next_endpoint = self._endpoints.index(old.endpoint) + 1
            log.info("leaving %s: %s", old.endpoint, old.broken or "it goes away")
            task = asyncio.create_task(_retire(old))
            self._retiring[task] = old
            task.add_done_callback(self._retiring.pop)
        timeout_s = None if self._on_absent == "wait" else self._connect_timeout_s
        self._stream = await self._connect_any(timeout_s)
        return self._stream

    async def _connect_any(self, timeout_s: float | None) -> TeacherStream:
        loop = asyncio.get_running_loop()
        give_up = None if timeout_s is None else loop.time() + timeout_s
        attempt = 0
        while True:
            endpoint = self._endpoints[(self._next_endpoint + attempt) % len(self._endpoints)]
            left = self._connect_timeout_s if give_up is None else give_up - loop.time()
            try:
                # Several endpoints share the time; a single one gets it all.
                share_s = max(left, 0.0) / len(self._endpoints)
                stream, info = await TeacherStream.connect(
                    endpoint, self._handshake, max(share_s, 0.05)
                )
            except (NotReadyError, CapacityError) as error:
                attempt += 1
                pause_s = backoff_s(self.limits, attempt // len(self._endpoints))
                if give_up is not None and loop.time() + pause_s >= give_up:
                    raise NotReadyError(
                        f"no teacher at {', '.join(self._endpoints)} is ready after "
                        f"{timeout_s:.1f} s: {error.message}"
                    ) from error
                await asyncio.sleep(pause_s)
                continue
            try:
                self._accept(endpoint, info)
            except FingerprintMismatchError:
                await stream.aclose()
                raise
            return stream

    def _accept(self, endpoint: str, info: TeacherInfo) -> None:
        first = self._info or info
        names = _SAME_TEACHER if first.weights_digest else (*_SAME_NAME, *_SAME_TEACHER)
        for name in names:
            before, now = getattr(first, name), getattr(info, name)
            if before != now:
                raise FingerprintMismatchError(
                    f"{endpoint} now serves {name} {now!r}, the run began with {before!r}"
                )
        self._info = info


def _seen(task: asyncio.Task[TeacherStream]) -> None:
    """Those who waited get the error; there may be none left."""
    if not task.cancelled():
        task.exception()


async def _retire(stream: TeacherStream) -> None:
    """Lets a stream that goes away answer what it still owes, then closes it."""
    while stream.busy and stream.broken is None:
        await asyncio.sleep(0.05)
    await stream.aclose()


class TeacherSession:
    """One response and its scores. Appends are in order, one at a time."""

    def __init__(
        self,
        client: TeacherClient,
        prompt_ids: NDArray[np.int32],
        options: ScoreOptions,
        policy: DriftPolicy | None,
    ) -> None:
        self.session_id = uuid.uuid4().hex
        self._client = client
        self._prompt_ids = np.array(prompt_ids, np.int32)
        self._options = options
        self._policy = policy
        self._scored_ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self._bad: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._drift: DriftState | None = None
        self._opened_on: TeacherStream | None = None
        self._in_step = False
        """The server's session on that stream stands where this one does."""
        self._lock = asyncio.Lock()

    @property
    def num_scored(self) -> int:
        """Response tokens whose scores have arrived."""
        return len(self._scored_ids)

    @property
    def drift(self) -> DriftState | None:
        """Drift after the scored tokens; None without a policy or before the first append."""
        return self._drift

    async def append(self, span: TokenSpan, *, deadline_s: float | None = None) -> Scores:
        """The scores of the next tokens; an offset below num_scored rewinds first.

        Survives broken streams, restarts, evictions and full servers within the client's
        RetryLimits. Raises DeadlineError when the server did not start in deadline_s, and every
        error that trying again cannot mend; the session is then as it was.
        """
        async with self._lock:
            if span.offset > self.num_scored:
                raise SessionOffsetError(
                    f"append at {span.offset}, but the session has {self.num_scored} scored tokens",
                    expected_offset=self.num_scored,
                    offset=span.offset,
                )
            self._rewind(span.offset)
            deadline_ms = 0 if deadline_s is None else max(1, int(deadline_s * 1000))
            with tracing.span("append", offset=span.offset, tokens=len(span)):
                scores = await self._deliver(span, deadline_ms)
            self._scored_ids = np.concatenate([self._scored_ids, span.token_ids])
            if scores.rows.bad_events is not None:
                self._bad = np.concatenate([self._bad, scores.rows.bad_events])
            self._drift = scores.drift
            return scores

    async def close(self) -> None:
        """Tells the server to forget the session. Never fails: a lost server has forgotten it."""
        async with self._lock:
            stream, self._opened_on = self._opened_on, None
            if stream is None or stream is not self._client.live_stream_or_none():
                return
            request = pb.SessionRequest(close=pb.Close(session_id=self.session_id))
            try:
                await stream.exchange(self.session_id, [request])
            except (TeacherError, BrokenStreamError) as error:
                log.info("session %s ended without an answer: %s", self.session_id, error)

    async def _deliver(self, span: TokenSpan, deadline_ms: int) -> Scores:
        append = pb.SessionRequest()
        append.append.session_id = self.session_id
        append.append.deadline_ms = deadline_ms
        append.append.traceparent = tracing.traceparent()
        codec.write_span(append.append.span, span)
        size = append.ByteSize()
        if size > codec.MAX_MESSAGE_BYTES:
            limit = codec.MAX_MESSAGE_BYTES
            raise InvalidRequestError(f"the append has {size} bytes, the limit is {limit}")
        patience = Patience(self._client.limits)
        while True:
            stream = await self._client.live_stream()
            in_step = self._in_step and self._opened_on is stream
            requests = [append] if in_step else [self._open_request(), append]
            self._opened_on, self._in_step = stream, False
            try:
                chunks = await stream.exchange(self.session_id, requests)
                scores = codec.decode_scores(chunks)
            except (TeacherError, BrokenStreamError) as error:
                await patience.after(error)
            else:
                self._in_step = True
                return scores

    def _open_request(self) -> pb.SessionRequest:
        return pb.SessionRequest(
            open=pb.Open(
                session_id=self.session_id,
                prompt_ids=codec.encode_ids(self._prompt_ids),
                scored_ids=codec.encode_ids(self._scored_ids),
                drift=codec.encode_drift(self._drift),
                options=codec.encode_options(self._options),
                policy=codec.encode_policy(self._policy),
            )
        )

    def _rewind(self, offset: int) -> None:
        if offset == self.num_scored:
            return
        self._scored_ids = self._scored_ids[:offset]
        self._bad = self._bad[:offset]
        if self._drift is not None:
            exhausted_at = self._drift.exhausted_at
            still = exhausted_at is not None and exhausted_at <= offset
            self._drift = DriftState(
                num_tokens=offset,
                num_bad_events=int(self._bad.sum()),
                exhausted_at=exhausted_at if still else None,
            )
