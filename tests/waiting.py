"""Waiting for what a test expects: until it is so, however busy the machine.

A test claims that something happens, not that it happens soon. The limit is there so that a fault
ends in a message instead of a hang; pytest's own timeout is longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LIMIT_S = 180.0
"""Longer than an engine takes to start with four busy processes beside it."""


async def eventually(check: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Returns once something holds; the event loop goes on meanwhile."""
    give_up = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < give_up, "did not happen in time"
        await asyncio.sleep(0.01)


def wait_until(check: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """The same where there is no event loop."""
    give_up = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < give_up, "did not happen in time"
        time.sleep(0.02)
