"""Whether a failed request to a teacher is worth trying again, and when. No torch, no transport."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from teacher_wire.errors import (
    CapacityError,
    NotReadyError,
    SessionNotFoundError,
    SessionOffsetError,
    TeacherError,
)


class BrokenStreamError(Exception):
    """The stream ended before the answer; what was asked may or may not have been done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLimits:
    """How long one request is tried."""

    capacity_wait_s: float = 300.0
    """Waiting for a full server, all hints together."""
    max_resends: int = 20
    """Broken streams that one request may meet; over HTTP, how often it is sent again."""
    max_reopens: int = 20
    """Lost sessions that one request may meet."""
    first_backoff_s: float = 0.05
    max_backoff_s: float = 2.0


class Patience:
    """Decides after each failure of one request whether to try again, and waits before it."""

    def __init__(self, limits: RetryLimits, *, resends: str = "broken streams") -> None:
        """`resends` is what max_resends counts, in words."""
        self._limits = limits
        self._said = resends
        self._waited_s = 0.0
        self._resends = 0
        self._reopens = 0

    async def after(self, error: TeacherError | BrokenStreamError) -> None:
        """Returns when it is time to try again; raises the error when it is not worth it."""
        if pause_s := self.pause_s(error):
            await asyncio.sleep(pause_s)

    def pause_s(self, error: TeacherError | BrokenStreamError) -> float:
        """How long to wait before trying again; raises the error when it is not worth it."""
        if isinstance(error, CapacityError) and error.retry_after_ms:
            # The sum of the hints bounds the wait; jitter keeps trainers from coming back together.
            if self._waited_s >= self._limits.capacity_wait_s:
                raise error
            pause_s = error.retry_after_ms / 1000 * random.uniform(0.75, 1.5)
            self._waited_s += pause_s
            return pause_s
        if isinstance(error, BrokenStreamError | NotReadyError):
            self._resends += 1
            if self._resends > self._limits.max_resends:
                raise NotReadyError(
                    f"given up after {self._limits.max_resends} {self._said}: {error}"
                ) from error
            return backoff_s(self._limits, self._resends - 1)
        if isinstance(error, SessionNotFoundError | SessionOffsetError):
            self._reopens += 1
            if self._reopens > self._limits.max_reopens:
                raise error
            return 0.0
        raise error


def backoff_s(limits: RetryLimits, attempt: int) -> float:
    """Pause before attempt + 1, s: doubling, capped, and anywhere from a quarter of it to all.

    So wide that clients which lost a server together are spread over the whole pause when it comes
    back, and so short that none is later than max_backoff_s.
    """
    full = min(limits.max_backoff_s, limits.first_backoff_s * 2.0 ** min(attempt, 30))
    return full * random.uniform(0.25, 1.0)
