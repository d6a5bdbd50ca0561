"""The seam between sessions and whoever decides whose turn it is."""

from __future__ import annotations

from typing import Protocol

from teacher_server.engine.base import EngineRows, ScoreQuery
from teacher_wire.records import Timing


class Scorer(Protocol):
    """What a session table asks for rows; teacher_server.admission.scheduler.Scheduler."""

    async def score(
        self,
        query: ScoreQuery,
        *,
        tenant: str,
        deadline_s: float | None = None,
        background: bool = False,
        more_follows: bool = True,
    ) -> tuple[EngineRows, Timing]: ...

    def forget(self, session: str) -> None: ...
