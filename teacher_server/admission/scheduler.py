"""Admission between sessions and the engine. Knows queries and tenants, no model and no transport.

A few queries are in the engine; the others wait in one line a tenant, and a free place goes to the
tenants in fair turns (fair_queue.py beside this), so that a trainer with 500 rollouts does not
starve one with 5. The engine batches what it is given in an order of its own, so fairness is
decided here, at its door, and needs the engine to hold little: `max_running` queries and
`max_running_tokens` new tokens. The cost of a query is its new tokens. A query whose deadline
passes while it waits never reaches the engine.

Work that may wait (`background`: analysis) is held back before that line, at a pace (pace.py beside
this): the line alone would let it in wherever the engine has room.

There is no worker task: a caller waits for its place and then calls the engine itself, so
cancelling the caller cancels the work, wherever it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from teacher_server.access.tenants import OpenTenants, Tenant, Tenants
from teacher_server.admission.fair_queue import FairQueue
from teacher_server.admission.pace import Pace
from teacher_server.admission.tenant_limits import TenantLimits, hint_ms
from teacher_server.engine.base import EngineRows, ScoreQuery, ScoringEngine
from teacher_wire.errors import CapacityError, DeadlineError, EngineError, TeacherError
from teacher_wire.records import Timing

log = logging.getLogger(__name__)
_OUT_OF_MEMORY_HINT_MS = 500
_QUIET_S = 0.5
"""Without foreground work for so long, background work has nobody to wait for: longer than trainers
take between an answer and the next append."""
_TICK_S = 0.001
_RATE_MEMORY = 0.9
"""Weight of the past in the running mean of tokens a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much work is taken on."""

    max_running: int = 64
    """Queries in the engine at once."""
    max_running_tokens: int = 16_384
    """New tokens in the engine at once; one query alone may be larger."""
    max_queued_tokens: int = 65_536
    """New tokens waiting for the engine; one query alone may be larger."""
    background_share: float = 0.1
    """Weight of background work, as a share of its tenant's."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A query in line; `place` resolves when it may enter the engine."""

    tokens: int
    tenant: Tenant
    background: bool
    place: asyncio.Future[None]


class Scheduler:
    """Takes queries from many tenants to one engine, in fair turns."""

    def __init__(
        self,
        engine: ScoringEngine,
        limits: SchedulerLimits,
        *,
        tenants: Tenants | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet_s: float = _QUIET_S,
    ) -> None:
        """Without tenants, every name is one with weight 1 and no limits of its own."""
        self._engine = engine
        self._limits = limits
        self._tenants = tenants or OpenTenants()
        self._tenant_limits = TenantLimits(self._tenants, clock=clock)
        self._clock = clock
        self._quiet_s = quiet_s
        self._pace = Pace(share=limits.background_share, quiet_s=quiet_s, clock=clock)
        self._held: dict[str, deque[_Waiter]] = {}
        """Background queries that are held back, by tenant, first come first."""
        self._waiting: FairQueue[_Waiter] = FairQueue()
        self.num_running = 0
        """Queries in the engine."""
        self._granted = 0
        """Places taken, by queries in the engine or about to enter it."""
        self._granted_tokens = 0
        self._tokens_per_s = 1000.0

    @property
    def queued_tokens(self) -> int:
        """New tokens waiting for the engine."""
        return self._waiting.tokens + sum(map(self._held_tokens, self._held))

    @property
    def num_queued(self) -> int:
        """Queries waiting for the engine."""
        return len(self._waiting) + sum(map(len, self._held.values()))

    def forget(self, session: str) -> None:
        """Lets the engine drop what it holds for a session."""
        self._engine.forget(session)

    async def score(
        self,
        query: ScoreQuery,
        *,
        tenant: str,
        deadline_s: float | None = None,
        background: bool = False,
        more_follows: bool = True,
    ) -> tuple[EngineRows, Timing]:
        """Rows of one query and where the time went.

        `deadline_s` counts from now. A background query may be held back for others, and for a
        while after those that more follows: between two appends of a stream. Raises
        CapacityError with a hint when the line is full, QuotaError or RateLimitedError with a hint
        at a limit of the tenant, DeadlineError when the query has not started in time, EngineError
        or NonFiniteError when the engine fails.
        """
        if deadline_s is not None and deadline_s <= 0:
            raise DeadlineError(f"the deadline had passed by {-deadline_s:.3f} s on arrival")
        tokens = len(query.token_ids) - query.first_row
        booked = self._tenant_limits.admit(tenant, tokens, tokens_per_s=self._tokens_per_s)
        entered = None
        if not background:
            self._pace.arrive(tenant, booked.weight)
        try:
            arrived = self._clock()
            await self._enter(tokens, booked, deadline_s, background)
            entered = self._clock()
            rows = await self._run(query, tokens, entered)
        finally:
            self._tenant_limits.finish(booked, tokens, scored=entered is not None)
            if not background:
                self._pace.leave(tenant, more_follows=more_follows)
                if self._held:
                    self._let_go_when_silent()
        left = self._clock()
        return rows, Timing(
            queue_us=int((entered - arrived) * 1e6),
            engine_us=int((left - entered) * 1e6),
            computed_tokens=rows.computed_tokens,
        )

    async def _run(self, query: ScoreQuery, tokens: int, entered: float) -> EngineRows:
        self.num_running += 1
        try:
            rows = await self._ask(query)
            self._learn_rate(self._clock() - entered)
        finally:
            self.num_running -= 1
            self._leave(tokens)
        return rows

    async def _ask(self, query: ScoreQuery) -> EngineRows:
        try:
            return await self._engine.score(query)
        except TeacherError:
            raise
        except MemoryError as error:
            log.warning("the engine ran out of memory on %d tokens", len(query.token_ids))
            raise CapacityError(
                "the engine ran out of memory", retry_after_ms=_OUT_OF_MEMORY_HINT_MS
            ) from error
        except Exception as error:
            log.exception("the engine failed on %d tokens", len(query.token_ids))
            raise EngineError("the engine failed on this request; see the server's log") from error

    async def _enter(
        self, tokens: int, tenant: Tenant, deadline_s: float | None, background: bool
    ) -> None:
        if not background and not self._waiting and self._fits(tokens):
            self._grant(tokens, background)
            return
        loop = asyncio.get_running_loop()
        waiter = _Waiter(tokens, tenant, background, loop.create_future())
        if background and (tenant.name in self._held or not self._pace.allows(tenant.name)):
            self._refuse_when_full(tokens, tenant.name)
            self._held.setdefault(tenant.name, deque()).append(waiter)
            # The foreground may have fallen silent already.
            loop.call_later(self._quiet_s + _TICK_S, self._let_go)
        elif not self._waiting and self._fits(tokens):
            self._charge(waiter)
            self._grant(tokens, background)
            return
        else:
            self._refuse_when_full(tokens, tenant.name)
            self._charge(waiter)
            self._stand_in_line(waiter)
        timer = None
        if deadline_s is not None:
            timer = loop.call_later(deadline_s, self._expire, waiter, deadline_s)
        try:
            await waiter.place
        except asyncio.CancelledError:
            place = waiter.place
            if place.cancelled():
                self._drop(waiter)
            elif place.exception() is None:
                # Granted in the same turn of the loop: the place must not be lost with the caller.
                self._leave(tokens)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _let_go_when_silent(self) -> None:
        if not self._pace.has_foreground:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._let_go)
            loop.call_later(self._quiet_s + _TICK_S, self._let_go)

    def _held_tokens(self, tenant: str) -> int:
        return sum(waiter.tokens for waiter in self._held.get(tenant, ()))

    def _charge(self, waiter: _Waiter) -> None:
        """Background work goes into debt; once it is let go it waits like any other."""
        if waiter.background:
            self._pace.background(waiter.tenant.name, waiter.tokens)

    def _stand_in_line(self, waiter: _Waiter) -> None:
        tenant = waiter.tenant
        self._waiting.push(tenant.name, waiter, waiter.tokens, weight=tenant.weight)

    def _let_go(self) -> None:
        """Background queries that need not be held back any more stand in line."""
        for name, held in list(self._held.items()):
            while held and self._pace.allows(name):
                waiter = held.popleft()
                self._charge(waiter)
                self._stand_in_line(waiter)
            if not held:
                del self._held[name]
        self._admit()

    def _refuse_when_full(self, tokens: int, tenant: str) -> None:
        """A tenant may fill as much of the queue as is still free: one alone half of it, two a
        third each, so that there is always room for one more."""
        queued, limit = self.queued_tokens, self._limits.max_queued_tokens
        own = self._waiting.tokens_of(tenant) + self._held_tokens(tenant)
        rate = self._tokens_per_s
        if queued and queued + tokens > limit:
            raise CapacityError(
                f"{queued} tokens are queued and {tokens} more pass the limit of {limit}",
                retry_after_ms=hint_ms(queued, rate),
            )
        if own and own + tokens > limit - queued:
            raise CapacityError(
                f"{own} tokens of tenant {tenant!r} are queued and {tokens} more pass its part of "
                f"the queue, {limit - queued} at present",
                retry_after_ms=hint_ms(own, rate),
            )

    def _expire(self, waiter: _Waiter, deadline_s: float) -> None:
        if not waiter.place.done():
            waiter.place.set_exception(
                DeadlineError(f"not started within its deadline of {deadline_s:.3f} s")
            )
            self._drop(waiter)

    def _drop(self, waiter: _Waiter) -> None:
        name = waiter.tenant.name
        held = self._held.get(name)
        if held is not None and waiter in held:
            held.remove(waiter)
            if not held:
                del self._held[name]
        elif self._waiting.remove(name, waiter):
            # It may have been next, and too large for what is free.
            self._admit()

    def _fits(self, tokens: int) -> bool:
        if self._granted >= self._limits.max_running:
            return False
        limit = self._limits.max_running_tokens
        return not self._granted or self._granted_tokens + tokens <= limit

    def _grant(self, tokens: int, background: bool) -> None:
        self._granted += 1
        self._granted_tokens += tokens
        if not background:
            self._pace.foreground(tokens, self._weight_of)
            if self._held:
                asyncio.get_running_loop().call_soon(self._let_go)

    def _weight_of(self, tenant: str) -> float:
        return self._tenants.get(tenant).weight

    def _leave(self, tokens: int) -> None:
        self._granted -= 1
        self._granted_tokens -= tokens
        self._admit()

    def _admit(self) -> None:
        """Fills free places. A query that does not fit is waited for: it is its turn."""
        while (waiter := self._waiting.peek()) is not None and self._fits(waiter.tokens):
            self._waiting.pop()
            if not waiter.place.done():
                waiter.place.set_result(None)
                self._grant(waiter.tokens, waiter.background)

    def _learn_rate(self, seconds: float) -> None:
        if seconds > 0:
            rate = self._granted_tokens / seconds
            past = self._tokens_per_s
            self._tokens_per_s = _RATE_MEMORY * past + (1 - _RATE_MEMORY) * rate
