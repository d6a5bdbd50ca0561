"""The sessions a teacher holds for its trainers. Knows no transport, no model and no thresholds.

A session is a cache of what the client knows: prompt, scored tokens and drift. Appends are
idempotent by (session, offset): an offset below the scored length rewinds first, one beyond it is
a SessionOffsetError. A session can be rewound down to the point at which it was last opened,
because the bad events before it are known only as a sum. Idle sessions end after a time, or sooner
when a new one needs the room or their stream breaks; the client then opens it again with the full
prefix.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from teacher_server.access.tenants import OpenTenants, Tenants
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.appends import Appends
from teacher_server.scoring.eviction import fits_beyond, givers
from teacher_server.scoring.judging import joined, pieces
from teacher_server.scoring.scorer import Scorer
from teacher_server.scoring.session import Session, engine_name
from teacher_server.scoring.validation import (
    check_drift,
    check_open,
    check_total_length,
)
from teacher_wire.errors import (
    CapacityError,
    InvalidRequestError,
    QuotaError,
    SessionNotFoundError,
)
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    Scores,
    TeacherInfo,
    TokenSpan,
)

_EMPTY_IDS: NDArray[np.int32] = np.zeros(0, np.int32)
_EVICTION_HINT_MS = 500
_BACKGROUND_PIECE_TOKENS = 256
"""Of background work, so that others wait for no more than that."""


class SessionTable:
    """All sessions of a server, by tenant and name."""

    def __init__(
        self,
        scorer: Scorer,
        info: TeacherInfo,
        *,
        metrics: Metrics,
        tenants: Tenants | None = None,
        ttl_s: float = 600.0,
        evict_idle_s: float = 1.0,
        resume_window_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Limits come from `info`, which is also what clients are told.

        A session idle for ttl_s ends; one idle for evict_idle_s may make room for a new one; one
        whose stream broke ends after resume_window_s, unless it is opened again before.
        """
        self._scorer = scorer
        self._appends = Appends(scorer, info, metrics=metrics, clock=clock)
        self._info = info
        self._metrics = metrics
        self._tenants = tenants or OpenTenants()
        self._ttl_s = ttl_s
        self._evict_idle_s = evict_idle_s
        self._resume_window_s = resume_window_s
        self._clock = clock
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        """Least recently used first."""
        self._detached: deque[tuple[float, Session]] = deque()
        """Sessions whose stream broke, with the time at which they end; first to end first."""
        self._once = itertools.count()

    def __len__(self) -> int:
        return len(self._sessions)

    def num_active(self) -> int:
        """Sessions with an append waiting or running."""
        return sum(session.num_pending > 0 for session in self._sessions.values())

    def num_tokens(self) -> int:
        """Tokens of all sessions, prompts included."""
        return sum(len(s.prompt_ids) + len(s.scored_ids) for s in self._sessions.values())

    def by_tenant(self) -> Counter[str]:
        """Sessions of each tenant that has any."""
        return Counter(tenant for tenant, _ in self._sessions)

    def open(
        self,
        session_id: str,
        prompt_ids: NDArray[np.int32],
        options: ScoreOptions,
        policy: DriftPolicy | None,
        *,
        tenant: str,
        owner: object = None,
        scored_ids: NDArray[np.int32] = _EMPTY_IDS,
        drift_state: DriftState | None = None,
    ) -> int:
        """Starts, resumes or replaces a session; returns the offset at which it goes on.

        Raises InvalidRequestError, CapacityError when every session is in use, or QuotaError when
        the tenant has as many in use as it may.
        """
        check_open(self._info, session_id, prompt_ids, scored_ids, options, policy)
        opened_at = check_drift(policy, drift_state, len(scored_ids))
        self.expire()
        key = (tenant, session_id)
        is_held = key in self._sessions
        try:
            if not is_held:
                self._make_room_of(tenant)
                self._make_room(tenant)
        except CapacityError:
            if len(scored_ids):
                self._metrics.resumed("refused")
            raise
        if len(scored_ids):
            self._metrics.resumed("held" if is_held else "rebuilt")
        self._sessions[key] = Session(
            session_id=session_id,
            tenant=tenant,
            prompt_ids=prompt_ids,
            options=options,
            policy=policy,
            scored_ids=scored_ids,
            opened_at=opened_at,
            last_used=self._clock(),
            owner=owner,
            tally=self._metrics.tenant(tenant),
        )
        self._sessions.move_to_end(key)
        self._metrics.sessions_open(len(self._sessions))
        return len(scored_ids)

    def options_of(self, session_id: str, *, tenant: str) -> ScoreOptions:
        """What the rows of an open session hold."""
        return self._find(session_id, tenant).options

    async def append(
        self, session_id: str, span: TokenSpan, *, tenant: str, deadline_s: float | None = None
    ) -> Scores:
        """Scores a piece of a response and advances its drift; a failed append changes nothing.

        Appends of one session are carried out one after the other. Raises InvalidRequestError,
        SessionNotFoundError, SessionOffsetError, CapacityError, DeadlineError, EngineError or
        NonFiniteError.
        """
        session, key = self._find(session_id, tenant), (tenant, session_id)
        session.num_pending += 1
        give_up = None if deadline_s is None else self._clock() + deadline_s
        try:
            async with session.lock:
                scores = await self._appends.score(session, span, give_up)
        finally:
            session.num_pending -= 1
            is_held = self._sessions.get(key) is session
            if is_held:
                session.last_used = self._clock()
                self._sessions.move_to_end(key)
        if not is_held:
            raise SessionNotFoundError(f"session {session_id!r} was closed or replaced meanwhile")
        return scores

    def close(self, session_id: str, *, tenant: str, owner: object = None) -> bool:
        """Ends a session; False when there is none of that name, which is not an error.

        With an owner, a session that somebody else has opened since stays.
        """
        session = self._sessions.get((tenant, session_id))
        if session is None or (owner is not None and session.owner is not owner):
            return False
        self._end((tenant, session_id))
        return True

    def detach(self, session_ids: Iterable[str], *, tenant: str, owner: object) -> None:
        """Their stream broke: those that nobody opens again end after the resume window."""
        ends_at = self._clock() + self._resume_window_s
        found = [self._sessions.get((tenant, session_id)) for session_id in session_ids]
        ours = [session for session in found if session is not None and session.owner is owner]
        self._detached.extend((ends_at, session) for session in ours)
        if ours:
            asyncio.get_running_loop().call_later(self._resume_window_s + 0.01, self.expire)

    def expire(self) -> int:
        """Ends the sessions that are idle for ttl_s or detached for too long; returns how many."""
        now = self._clock()
        num_lost = 0
        while self._detached and self._detached[0][0] <= now:
            session = self._detached.popleft()[1]
            key = (session.tenant, session.session_id)
            # One that was opened again is another object.
            if self._sessions.get(key) is session:
                self._end(key)
                num_lost += 1
        stale = []
        for key, session in self._sessions.items():
            if session.last_used > now - self._ttl_s:
                break
            if not session.num_pending:
                stale.append(key)
        for key in stale:
            self._end(key)
        if stale:
            self._metrics.evicted("idle", len(stale))
        if num_lost:
            self._metrics.evicted("lost", num_lost)
        return num_lost + len(stale)

    async def score_once(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
        *,
        tenant: str,
        deadline_s: float | None = None,
        keep_as: str | None = None,
    ) -> Scores:
        """Scores one whole response of any length that fits the context; the table keeps nothing.

        Under the name `keep_as` the engine may keep what it has computed, for a later call of that
        name whose text begins alike, until `drop`; not of a call that fails.
        """
        parts = self.score_in_pieces(
            prompt_ids,
            span,
            options,
            policy,
            tenant=tenant,
            deadline_s=deadline_s,
            keep_as=keep_as,
        )
        return joined([part async for part in parts])

    async def score_in_pieces(
        self,
        prompt_ids: NDArray[np.int32],
        span: TokenSpan,
        options: ScoreOptions,
        policy: DriftPolicy | None,
        *,
        tenant: str,
        deadline_s: float | None = None,
        background: bool = False,
        keep_as: str | None = None,
    ) -> AsyncIterator[Scores]:
        """As score_once, piece by piece; in the background small ones, which may be held back."""
        if span.offset:
            raise InvalidRequestError(f"span offset is {span.offset}, must be 0")
        name = keep_as or f"once-{next(self._once)}"
        check_open(self._info, name, prompt_ids, _EMPTY_IDS, options, policy)
        check_total_length(self._info, len(prompt_ids) + len(span))
        session = Session(
            session_id=name,
            tenant=tenant,
            prompt_ids=prompt_ids,
            options=options,
            policy=policy,
            background=background,
            is_stream=False,
            last_used=self._clock(),
            tally=self._metrics.tenant(tenant),
        )
        give_up = None if deadline_s is None else self._clock() + deadline_s
        size = self._info.max_append_tokens
        is_kept = False
        try:
            for piece in pieces(span, min(size, _BACKGROUND_PIECE_TOKENS) if background else size):
                yield await self._appends.score(session, piece, give_up)
            is_kept = keep_as is not None
        finally:
            if not is_kept:
                self._scorer.forget(session.engine_name)

    def drop(self, name: str, *, tenant: str) -> None:
        """Lets the engine drop what it keeps under a name of `score_once`."""
        self._scorer.forget(engine_name(tenant, name))

    def _find(self, session_id: str, tenant: str) -> Session:
        session = self._sessions.get((tenant, session_id))
        if session is None:
            raise SessionNotFoundError(f"no session {session_id!r}: it expired or was never opened")
        return session

    def _make_room_of(self, tenant: str) -> None:
        """A tenant at its own limit makes room with its own sessions."""
        limit = self._tenants.get(tenant).max_sessions
        if limit is None:
            return
        own = self._of(tenant)
        if len(own) >= limit and not self._evict_one(own):
            raise QuotaError(
                f"{len(own)} sessions of tenant {tenant!r} are open and in use, its limit is "
                f"{limit}",
                retry_after_ms=_EVICTION_HINT_MS,
            )

    def _evict_one(self, keys: Iterable[tuple[str, str]]) -> bool:
        """Ends the first of the sessions, least recently used first, that has been idle."""
        limit = self._clock() - self._evict_idle_s
        for key in keys:
            session = self._sessions[key]
            if session.last_used > limit:
                break
            if not session.num_pending:
                self._end(key)
                self._metrics.evicted("room")
                return True
        return False

    def _make_room(self, tenant: str) -> None:
        limit = self._info.max_sessions
        if len(self._sessions) < limit:
            return
        num_open = self.by_tenant()
        weights = {name: self._tenants.get(name).weight for name in {*num_open, tenant}}
        for name in givers(num_open, weights, tenant):
            if self._evict_one(self._of(name)):
                return
        if not fits_beyond(limit, num_open, weights, tenant):
            raise CapacityError(
                f"{len(self._sessions)} sessions are open and in use, the limit is {limit}",
                retry_after_ms=_EVICTION_HINT_MS,
            )

    def _of(self, tenant: str) -> list[tuple[str, str]]:
        """The sessions of a tenant, least recently used first."""
        return [key for key in self._sessions if key[0] == tenant]

    def _end(self, key: tuple[str, str]) -> None:
        self._scorer.forget(self._sessions.pop(key).engine_name)
        self._metrics.sessions_open(len(self._sessions))
