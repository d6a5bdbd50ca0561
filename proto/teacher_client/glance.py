"""One look at one teacher: what it serves, and which tokens it has. Nothing is tried again, and no
session is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from teacher_client.access import TeacherAccess
from teacher_client.stream import Handshake, TeacherStream
from teacher_wire.records import TeacherInfo


@dataclass(frozen=True, slots=True)
class Glance:
    """A teacher as it is now."""

    info: TeacherInfo
    _stream: TeacherStream

    async def tokens(self, first_id: int, count: int) -> dict[int, str]:
        """As `TeacherClient.tokens`, asked once."""
        return await self._stream.tokens(first_id, count)


@asynccontextmanager
async def glance(
    endpoint: str, access: TeacherAccess, *, run_id: str, timeout_s: float
) -> AsyncIterator[Glance]:
    """Raises what `TeacherStream.connect` raises: NotReadyError for a teacher that is absent or
    loads, AccessError for a file that cannot be used."""
    shaken = Handshake(tokenizer_fingerprint="", vocab_size=0, run_id=run_id, access=access)
    stream, info = await TeacherStream.connect(endpoint, shaken, timeout_s)
    try:
        yield Glance(info, stream)
    finally:
        await stream.aclose()
