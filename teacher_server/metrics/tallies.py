"""Plain counts on the path of an append: the event loop adds to them, a scrape reads them.

Plain numbers, because a Prometheus counter or histogram takes a lock and several calls for what
happens thousands of times a second.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from dataclasses import dataclass, field

from teacher_wire.errors import CapacityError, DeadlineError


@dataclass(slots=True, eq=False)
class TenantTally:
    """What became of one tenant's queries; each is counted once it is over."""

    tokens_scored: int = 0
    """Response tokens whose rows were made."""
    admitted: int = 0
    """Reached the engine, and were answered by it with rows or a failure."""
    refused: int = 0
    """Turned away because something was full."""
    expired: int = 0
    """Dropped because their deadline passed before the engine was free."""
    cancelled: int = 0
    """Dropped because the client left or the stream broke."""
    unanswered: int = 0
    """Of the admitted, those that the engine failed."""
    unjudged: int = 0
    """Of the answered, those without a drift policy."""
    truncated: int = 0
    """Of the answered, those whose verdict was TRUNCATE; it is repeated on every later append."""

    @property
    def continued(self) -> int:
        """Those whose verdict was CONTINUE: all others, so that the usual case counts nothing."""
        return self.admitted - self.unanswered - self.unjudged - self.truncated

    def failed(self, error: BaseException) -> None:
        """Counts a query that got no rows."""
        if isinstance(error, asyncio.CancelledError):
            self.cancelled += 1
        elif isinstance(error, CapacityError):
            self.refused += 1
        elif isinstance(error, DeadlineError):
            self.expired += 1
        else:
            self.admitted += 1
            self.unanswered += 1


@dataclass(slots=True, eq=False)
class MessageTally:
    """Messages of one method."""

    received: int = 0
    sent: int = 0


@dataclass(slots=True, eq=False)
class TimeTally:
    """How long something took, by bucket, in the microseconds that a Timing has."""

    bounds_us: tuple[int, ...]
    """Upper ends of the buckets, the ends included; one bucket more has none."""
    counts: list[int] = field(init=False)
    total_us: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_us) + 1)

    def add(self, us: int) -> None:
        self.counts[bisect_left(self.bounds_us, us)] += 1
        self.total_us += us
