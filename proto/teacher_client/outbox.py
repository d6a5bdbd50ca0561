"""Requests of one stream on their way out: what waits at the same moment leaves together."""

from __future__ import annotations

import asyncio
from collections import deque

from teacher_wire.batches import MAX_BATCH_BYTES, MAX_BATCH_MESSAGES


class Outbox:
    """Encoded requests in order, for one writer and many producers."""

    def __init__(self) -> None:
        self.batches = False
        """Whether several may leave as one; known after the handshake."""
        self._waiting: deque[bytes] = deque()
        self._ended = False
        self._changed = asyncio.Event()

    def put(self, request: bytes) -> None:
        """Adds an encoded SessionRequest."""
        self._waiting.append(request)
        self._changed.set()

    def end(self) -> None:
        """Nothing follows what waits now."""
        self._ended = True
        self._changed.set()

    async def take(self) -> list[bytes]:
        """The next request, and those behind it that fit into one message; none at the end."""
        while not self._waiting:
            if self._ended:
                return []
            self._changed.clear()
            await self._changed.wait()
        taken = [self._waiting.popleft()]
        size = len(taken[0])
        while self.batches and self._waiting and len(taken) < MAX_BATCH_MESSAGES:
            size += len(self._waiting[0])
            if size > MAX_BATCH_BYTES:
                break
            taken.append(self._waiting.popleft())
        return taken
