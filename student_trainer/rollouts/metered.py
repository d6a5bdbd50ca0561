"""Sessions at a teacher that tell how long each round trip took, for whoever draws it."""

from __future__ import annotations

import time
from collections.abc import Callable

from student_trainer.rollouts.rollout import TeacherSession
from teacher_wire.errors import TeacherError
from teacher_wire.records import Scores, Timing, TokenSpan

Told = Callable[[float, Timing | None, str], None]
"""Seconds of a round trip, what the teacher says of them, and the class of the error it ended in:
of the last two one is there."""


class MeteredSession:
    """A session of another one; what a rollout waits for is told once it is over."""

    def __init__(self, session: TeacherSession, tell: Told) -> None:
        self._session = session
        self._tell = tell

    async def append(self, span: TokenSpan) -> Scores:
        """As the session's; the time has what the client tried again in it."""
        started = time.monotonic()
        try:
            scores = await self._session.append(span)
        except TeacherError as error:
            self._tell(time.monotonic() - started, None, type(error).__name__)
            raise
        self._tell(time.monotonic() - started, scores.timing, "")
        return scores

    async def close(self) -> None:
        await self._session.close()
