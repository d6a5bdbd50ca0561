"""What the client's tests share: spans, exact comparison, and a teacher that comes and goes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np

from teacher_client.client import TeacherClient, TeacherSession
from teacher_client.retry import RetryLimits
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.testing import LocalTeacher, local_teacher
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import (
    DriftPolicy,
    ScoreOptions,
    Scores,
    TokenSpan,
)
from tests.teacher.scoring.fake_rows import cut
from tests.waiting import LIMIT_S

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.05)
FAST = RetryLimits(first_backoff_s=0.01, max_backoff_s=0.1)


def make_span(num_tokens: int, *, seed: int = 0) -> TokenSpan:
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(512)[:16] for _ in range(num_tokens)]
    return TokenSpan(
        offset=0,
        token_ids=rng.integers(0, 512, num_tokens, dtype=np.int32),
        candidate_ids=np.array(rows, np.int32),
    )


async def reference(span: TokenSpan, policy: DriftPolicy = POLICY) -> Scores:
    async with local_teacher() as teacher:
        return await teacher.sessions.score_once(PROMPT, span, OPTIONS, policy, tenant="t")


@asynccontextmanager
async def client_of(*addresses: str, **changes: Any) -> AsyncIterator[TeacherClient]:
    arguments: dict[str, Any] = {
        "tokenizer_fingerprint": "",
        "vocab_size": 512,
        "run_id": "test",
        "connect_timeout_s": LIMIT_S,
        "limits": FAST,
    }
    client = await TeacherClient.connect(list(addresses), **(arguments | changes))
    try:
        yield client
    finally:
        await client.aclose()


async def append_all(session: TeacherSession, span: TokenSpan, step: int = 10) -> list[Scores]:
    return [
        await session.append(cut(span, start, min(start + step, len(span))))
        for start in range(session.num_scored, len(span), step)
    ]


class Restarting:
    """A teacher that can be taken away and brought back at the same address."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.teacher: LocalTeacher
        self._stack = AsyncExitStack()
        self.port = 0

    async def start(self, **changes: Any) -> None:
        self.teacher = await self._stack.enter_async_context(
            local_teacher(self.engine, port=self.port, **changes)
        )
        self.port = int(self.teacher.address.rsplit(":", 1)[1])

    async def stop(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def restarting() -> AsyncIterator[Restarting]:
    server = Restarting()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
