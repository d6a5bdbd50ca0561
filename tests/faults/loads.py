"""Loads on a teacher and how to judge them: trainers that never stop asking.

Judged by counts, which no other work on the machine moves: who was answered how often, and how many
answers others got while one waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_wire.records import ScoreOptions, TokenSpan
from tests.waiting import LIMIT_S

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
VOCAB = 512


@dataclass(slots=True)
class Tally:
    """What one tenant got."""

    num_tokens: int = 0
    overtaken: list[int] = field(default_factory=list)
    """Of each append: the answers that others got while it waited."""

    @property
    def num_answers(self) -> int:
        return len(self.overtaken)


class Race:
    """Tenants that ask without a pause until all of them together have had so many answers."""

    def __init__(self, num_answers: int) -> None:
        self.tallies: dict[str, Tally] = {}
        self.num_answered = 0
        self._num_answers = num_answers

    @property
    def over(self) -> bool:
        return self.num_answered >= self._num_answers

    async def run(self, address: str, name: str, *, sessions: int, append_tokens: int) -> None:
        """So many sessions of one tenant side by side, each with its next append at once."""
        self.tallies[name] = Tally()
        async with tenant(address, name) as client:
            await asyncio.gather(
                *(self._rollouts(client, name, append_tokens) for _ in range(sessions))
            )

    async def _rollouts(self, client: TeacherClient, name: str, append_tokens: int) -> None:
        ids = np.arange(append_tokens, dtype=np.int32) % VOCAB
        tally = self.tallies[name]
        while not self.over:
            session: Any = client.open(PROMPT, ScoreOptions(k=4), None)
            for index in range(32):
                if self.over:
                    break
                others = self.num_answered - tally.num_answers
                scores = await session.append(
                    TokenSpan(offset=index * append_tokens, token_ids=ids)
                )
                assert len(scores.rows) == append_tokens
                if not self.over:
                    tally.overtaken.append(self.num_answered - tally.num_answers - others)
                    tally.num_tokens += append_tokens
                    self.num_answered += 1
            await session.close()


@asynccontextmanager
async def tenant(address: str, name: str) -> AsyncIterator[TeacherClient]:
    """A trainer of that name, which waits as long as it is told to."""
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=VOCAB,
        run_id=name,
        connect_timeout_s=LIMIT_S,
        limits=RetryLimits(max_resends=5),
    )
    try:
        yield client
    finally:
        await client.aclose()
