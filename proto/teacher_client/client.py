"""The trainer's side of the contract: sessions that survive broken streams and restarted servers.
No torch.

A TeacherSession holds the truth of one response: prompt, scored tokens, drift. A server only
caches it. After a broken stream, a restart, the loss of a replica or an eviction the session is
opened again with that truth, where it belongs now, and the unanswered append is sent again; appends
are idempotent, so no row is lost, repeated or changed.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_client.access import TeacherAccess
from teacher_client.agreement import Agreement, Probe, Score
from teacher_client.endpoints import TeacherEndpoints
from teacher_client.retry import BrokenStreamError, Patience, RetryLimits
from teacher_client.stream import Handshake, TeacherStream
from teacher_wire import codec, tracing
from teacher_wire.errors import InvalidRequestError, SessionOffsetError, TeacherError
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

OnAbsent = Literal["fail", "wait"]
"""What to do when every endpoint is gone in mid-run: fail after the connect timeout, or wait."""


class TeacherClient:
    """A trainer's connection to its teacher, over all its replicas that are up."""

    def __init__(self, endpoints: TeacherEndpoints, *, run_id: str, limits: RetryLimits) -> None:
        """Use `connect`."""
        self.endpoints = endpoints
        self._run_id = run_id
        self.limits = limits

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[str],
        *,
        tokenizer_fingerprint: str,
        vocab_size: int,
        run_id: str,
        connect_timeout_s: float = 30.0,
        on_absent: OnAbsent = "fail",
        credit_bytes: int = 32 << 20,
        limits: RetryLimits | None = None,
        access: TeacherAccess | None = None,
        probe: Probe | None = None,
    ) -> TeacherClient:
        """A client after its first handshake; with a probe, which is a text and a bound, replicas
        are used only as long as they score it alike.

        Raises FingerprintMismatchError when a teacher speaks of other tokens or is not the same as
        the others, UnauthenticatedError or PermissionDeniedError when it turns this trainer away,
        NotReadyError naming the endpoints when none is ready within connect_timeout_s.
        """
        handshake = Handshake(
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            run_id=run_id,
            credit_bytes=credit_bytes,
            access=access or TeacherAccess(),
        )
        limits = limits or RetryLimits()
        replicas = TeacherEndpoints(
            endpoints,
            handshake,
            connect_timeout_s=connect_timeout_s,
            absent_timeout_s=None if on_absent == "wait" else connect_timeout_s,
            limits=limits,
            agreement=None if probe is None else Agreement(probe, _logprobs(run_id)),
        )
        await replicas.start()
        return cls(replicas, run_id=run_id, limits=limits)

    @property
    def info(self) -> TeacherInfo:
        """What the teacher serves."""
        return self.endpoints.info

    def open(
        self, prompt_ids: NDArray[np.int32], options: ScoreOptions, policy: DriftPolicy | None
    ) -> TeacherSession:
        """A session for one response; a server hears of it with the first append."""
        return TeacherSession(self, prompt_ids, options, policy)

    async def tokens(self, first_id: int, count: int) -> dict[int, str]:
        """Of a range of at most MAX_TOKENS_ASKED ids those that the teacher's tokenizer has a token
        for, with it. Raises what the teacher answers."""
        patience = Patience(self.limits)
        while True:
            stream = await self.endpoints.stream_for("tokens")
            try:
                return await stream.tokens(first_id, count)
            except (TeacherError, BrokenStreamError) as error:
                await patience.after(error)

    async def score(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
    ) -> Scores:
        """Scores one whole response, on any of the replicas."""
        request = _score_request(self._run_id, prompt_ids, span, options, policy)
        patience = Patience(self.limits)
        key = uuid.uuid4().hex
        while True:
            stream = await self.endpoints.stream_for(key)
            try:
                return codec.decode_scores(await stream.score(request))
            except (TeacherError, BrokenStreamError) as error:
                await patience.after(error)

    async def aclose(self) -> None:
        """Ends the streams; the servers drop the sessions that are still open."""
        await self.endpoints.aclose()


def _score_request(
    run_id: str,
    prompt_ids: NDArray[np.int32],
    span: TokenSpan,
    options: ScoreOptions,
    policy: DriftPolicy | None,
) -> pb.ScoreRequest:
    return pb.ScoreRequest(
        prompt_ids=codec.encode_ids(prompt_ids),
        span=codec.encode_span(span),
        options=codec.encode_options(options),
        policy=codec.encode_policy(policy),
        run_id=run_id,
    )


def _logprobs(run_id: str) -> Score[TeacherStream]:
    """Log-probs of tokens, asked over one stream."""

    async def score(stream: TeacherStream, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        span = TokenSpan(offset=0, token_ids=token_ids[1:])
        request = _score_request(run_id, token_ids[:1], span, ScoreOptions(k=1), None)
        return codec.decode_scores(await stream.score(request)).rows.token_logprobs

    return score


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
            before = self._scored_ids, self._bad, self._drift
            self._rewind(span.offset)
            deadline_ms = 0 if deadline_s is None else max(1, int(deadline_s * 1000))
            try:
                with tracing.span("append", offset=span.offset, tokens=len(span)):
                    scores = await self._deliver(span, deadline_ms)
            except BaseException:
                self._scored_ids, self._bad, self._drift = before
                raise
            self._scored_ids = np.concatenate([self._scored_ids, span.token_ids])
            if scores.rows.bad_events is not None:
                self._bad = np.concatenate([self._bad, scores.rows.bad_events])
            self._drift = scores.drift
            return scores

    async def close(self) -> None:
        """Tells the server to forget the session. Never fails: a lost server has forgotten it."""
        async with self._lock:
            stream, self._opened_on = self._opened_on, None
            if stream is None or not stream.usable:
                return
            request = pb.SessionRequest(close=pb.Close(session_id=self.session_id))
            try:
                await stream.exchange(self.session_id, [request.SerializeToString()])
            except (TeacherError, BrokenStreamError) as error:
                log.info("session %s ended without an answer: %s", self.session_id, error)

    async def _deliver(self, span: TokenSpan, deadline_ms: int) -> Scores:
        append = pb.SessionRequest()
        append.append.session_id = self.session_id
        append.append.deadline_ms = deadline_ms
        append.append.traceparent = tracing.traceparent()
        codec.write_span(append.append.span, span)
        raw = append.SerializeToString()
        if len(raw) > codec.MAX_MESSAGE_BYTES:
            limit = codec.MAX_MESSAGE_BYTES
            raise InvalidRequestError(f"the append has {len(raw)} bytes, the limit is {limit}")
        patience = Patience(self._client.limits)
        while True:
            stream = await self._stream()
            in_step = self._in_step and self._opened_on is stream
            requests = [raw] if in_step else [self._open_request(stream), raw]
            self._opened_on, self._in_step = stream, False
            try:
                chunks = await stream.exchange(self.session_id, requests)
                scores = codec.decode_scores(chunks)
            except (TeacherError, BrokenStreamError) as error:
                await patience.after(error)
            else:
                self._in_step = True
                return scores

    async def _stream(self) -> TeacherStream:
        """Where the session is, as long as that is up; else where it belongs now."""
        if self._opened_on is not None and self._opened_on.usable:
            return self._opened_on
        return await self._client.endpoints.stream_for(self.session_id)

    def _open_request(self, stream: TeacherStream) -> bytes:
        if self._opened_on is not None and self._opened_on.endpoint != stream.endpoint:
            self._client.endpoints.num_failovers += 1
        request = pb.SessionRequest(
            open=pb.Open(
                session_id=self.session_id,
                prompt_ids=codec.encode_ids(self._prompt_ids),
                scored_ids=codec.encode_ids(self._scored_ids),
                drift=codec.encode_drift(self._drift),
                options=codec.encode_options(self._options),
                policy=codec.encode_policy(self._policy),
            )
        )
        return request.SerializeToString()

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
