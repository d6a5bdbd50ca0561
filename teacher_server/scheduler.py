"""Admission between sessions and the engine. Knows queries and tenants, no model and no transport.

At most `max_running` queries are in the engine; the others wait in one line a tenant, and a free
place goes to the tenants in turn, so that a trainer with 500 rollouts does not starve one with 5.
The cost of a query is its new tokens. A query whose deadline passes while it waits never reaches
the engine.

There is no worker task: a caller waits for its place and then calls the engine itself, so
cancelling the caller cancels the work, wherever it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from teacher_server.engine.base import EngineRows, ScoreQuery, ScoringEngine
from teacher_wire.errors import CapacityError, DeadlineError, EngineError, TeacherError
from teacher_wire.records import Timing

log = logging.getLogger(__name__)
_MIN_HINT_MS, _MAX_HINT_MS = 50, 10_000
_RATE_MEMORY = 0.9
"""Weight of the past in the running mean of tokens a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """How much work is taken on."""

    max_running: int = 64
    """Queries in the engine at once."""
    max_queued_tokens: int = 65_536
    """New tokens waiting for the engine; one query alone may be larger."""


@dataclass(slots=True, eq=False)
class _Waiter:
    """A query in line; `place` resolves when it may enter the engine."""

    tokens: int
    place: asyncio.Future[None]


@dataclass(slots=True)
class _Load:
    """What the scheduler knows of its own load."""

    queued_tokens: int = 0
    tokens_per_s: float = 1000.0
    started: dict[int, float] = field(default_factory=dict)
    """Start time of each running query, by ticket."""


class Scheduler:
    """Takes queries from many tenants to one engine, in fair turns."""

    def __init__(
        self,
        engine: ScoringEngine,
        limits: SchedulerLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._lines: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        """Waiting queries by tenant; the first tenant is served next, then goes to the end."""
        self._load = _Load()
        self._granted = 0
        self._tickets = 0

    @property
    def queued_tokens(self) -> int:
        """New tokens waiting for the engine."""
        return self._load.queued_tokens

    @property
    def num_queued(self) -> int:
        """Queries waiting for the engine."""
        return sum(len(line) for line in self._lines.values())

    @property
    def num_running(self) -> int:
        """Queries in the engine."""
        return len(self._load.started)

    def oldest_running_s(self) -> float:
        """Age of the oldest query in the engine, 0 when there is none: the watchdog's reading."""
        started = self._load.started
        return self._clock() - min(started.values()) if started else 0.0

    def forget(self, session: str) -> None:
        """Lets the engine drop what it holds for a session."""
        self._engine.forget(session)

    async def score(
        self, query: ScoreQuery, *, tenant: str, deadline_s: float | None = None
    ) -> tuple[EngineRows, Timing]:
        """Rows of one query and where the time went.

        `deadline_s` counts from now. Raises CapacityError when the line is full, DeadlineError when
        the query has not started in time, EngineError or NonFiniteError when the engine fails.
        """
        tokens = len(query.token_ids) - query.first_row
        arrived = self._clock()
        await self._enter(tokens, tenant, deadline_s)
        entered = self._clock()
        self._tickets += 1
        ticket = self._tickets
        self._load.started[ticket] = entered
        try:
            rows = await self._ask(query)
        finally:
            del self._load.started[ticket]
            self._leave()
        left = self._clock()
        self._learn_rate(tokens, left - entered)
        return rows, Timing(
            queue_us=int((entered - arrived) * 1e6), engine_us=int((left - entered) * 1e6)
        )

    async def _ask(self, query: ScoreQuery) -> EngineRows:
        try:
            return await self._engine.score(query)
        except TeacherError:
            raise
        except Exception as error:
            log.exception("the engine failed on %d tokens", len(query.token_ids))
            raise EngineError("the engine failed on this request; see the server's log") from error

    async def _enter(self, tokens: int, tenant: str, deadline_s: float | None) -> None:
        if deadline_s is not None and deadline_s <= 0:
            raise DeadlineError(f"the deadline had passed by {-deadline_s:.3f} s on arrival")
        if self._granted < self._limits.max_running and not self._lines:
            self._granted += 1
            return
        self._refuse_when_full(tokens)
        waiter = _Waiter(tokens, asyncio.get_running_loop().create_future())
        self._lines.setdefault(tenant, deque()).append(waiter)
        self._load.queued_tokens += tokens
        timer = None
        if deadline_s is not None:
            timer = asyncio.get_running_loop().call_later(
                deadline_s, self._expire, waiter, tenant, deadline_s
            )
        try:
            await waiter.place
        except asyncio.CancelledError:
            place = waiter.place
            if place.cancelled():
                self._drop(waiter, tenant)
            elif place.exception() is None:
                # Granted in the same turn of the loop: the place must not be lost with the caller.
                self._leave()
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _refuse_when_full(self, tokens: int) -> None:
        queued, limit = self._load.queued_tokens, self._limits.max_queued_tokens
        if queued and queued + tokens > limit:
            hint = int(1000 * queued / self._load.tokens_per_s)
            raise CapacityError(
                f"{queued} tokens are queued and {tokens} more pass the limit of {limit}",
                retry_after_ms=min(max(hint, _MIN_HINT_MS), _MAX_HINT_MS),
            )

    def _expire(self, waiter: _Waiter, tenant: str, deadline_s: float) -> None:
        if not waiter.place.done():
            self._drop(waiter, tenant)
            waiter.place.set_exception(
                DeadlineError(f"not started within its deadline of {deadline_s:.3f} s")
            )

    def _drop(self, waiter: _Waiter, tenant: str) -> None:
        line = self._lines.get(tenant)
        if line is not None and waiter in line:
            line.remove(waiter)
            self._load.queued_tokens -= waiter.tokens
            if not line:
                del self._lines[tenant]

    def _leave(self) -> None:
        self._granted -= 1
        while self._lines and self._granted < self._limits.max_running:
            tenant, line = self._lines.popitem(last=False)
            waiter = line.popleft()
            self._load.queued_tokens -= waiter.tokens
            if line:
                self._lines[tenant] = line
            if not waiter.place.done():
                waiter.place.set_result(None)
                self._granted += 1

    def _learn_rate(self, tokens: int, seconds: float) -> None:
        if seconds > 0:
            rate = tokens * max(1, self._granted) / seconds
            past = self._load.tokens_per_s
            self._load.tokens_per_s = _RATE_MEMORY * past + (1 - _RATE_MEMORY) * rate
