"""Loads on a teacher and how to judge them: trainers that never stop asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from teacher_client.client import TeacherClient
from teacher_client.retry import RetryLimits
from teacher_wire.records import ScoreOptions, TokenSpan

START_S = 40.0
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
VOCAB = 512


@dataclass(slots=True)
class Tally:
    """What one tenant got."""

    num_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    """Of each append, as the trainer sees it."""

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))


@asynccontextmanager
async def tenant(address: str, name: str) -> AsyncIterator[TeacherClient]:
    """A trainer of that name, which waits as long as it is told to."""
    client = await TeacherClient.connect(
        [address],
        tokenizer_fingerprint="",
        vocab_size=VOCAB,
        run_id=name,
        connect_timeout_s=START_S,
        limits=RetryLimits(max_resends=5),
    )
    try:
        yield client
    finally:
        await client.aclose()


async def ask_without_pause(
    client: TeacherClient, tally: Tally, *, sessions: int, append_tokens: int, seconds: float
) -> None:
    """So many sessions side by side, each with its next append as soon as one is answered."""
    give_up = time.monotonic() + seconds
    ids = np.arange(append_tokens, dtype=np.int32) % VOCAB

    async def rollout() -> None:
        while time.monotonic() < give_up:
            session: Any = client.open(PROMPT, ScoreOptions(k=4), None)
            for index in range(32):
                started = time.monotonic()
                if started >= give_up:
                    break
                scores = await session.append(
                    TokenSpan(offset=index * append_tokens, token_ids=ids)
                )
                assert len(scores.rows) == append_tokens
                if time.monotonic() < give_up:
                    tally.num_tokens += append_tokens
                    tally.seconds.append(time.monotonic() - started)
            await session.close()

    await asyncio.gather(*(rollout() for _ in range(sessions)))
