"""The transformers reference, in a process of its own and without a server."""

from __future__ import annotations

from benchmarks.arms.base import Arm, Setup, Text
from teacher_server.engine.base import ScoreQuery
from teacher_server.engine.hf_engine import HfEngine


class Transformers(Arm):
    """One query at a time, a KV cache per response."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._engine = HfEngine(
            model=setup.model,
            dtype=setup.dtype,
            max_context=setup.max_context,
            max_k=setup.k,
            max_sessions=256,
        )
        self._responses = 0

    async def start(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()

    async def grow(self, text: Text, pieces: list[tuple[int, int]]) -> int:
        self._responses += 1
        session, rows = f"response-{self._responses}", 0
        for start, end in pieces:
            scored = await self._engine.score(
                ScoreQuery(
                    token_ids=text.upto(end),
                    first_row=len(text.prompt_ids) + start,
                    candidate_ids=text.candidate_ids[start:end],
                    k=self.setup.k,
                    temperature=1.0,
                    session=session,
                )
            )
            rows += len(scored.token_logprobs)
        self._engine.forget(session)
        return rows
