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


@dataclass(slots=True, eq=False)
class MessageTally:
    """Messages of one method."""

    received: int = 0
    sent: int = 0


@dataclass(slots=True, eq=False)
class TimeTally:
    """How long something took, by bucket."""

    bounds_s: tuple[float, ...]
    """Upper ends of the buckets, the ends included; one bucket more has none."""
    counts: list[int] = field(init=False)
    total_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += 1
        self.total_s += seconds
