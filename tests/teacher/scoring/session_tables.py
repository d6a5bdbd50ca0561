"""A session table with its engine, for the tests of sessions."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine, Fault
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.sessions import SessionTable
from teacher_server.testing import teacher_info
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import (
    DriftPolicy,
    ScoreOptions,
    Scores,
    TokenSpan,
)
from tests.teacher.scoring.fake_rows import (
    VOCAB,
    make_span,
)

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=16, want_entropy=True, want_rank=True)
POLICY = DriftPolicy(metric=OverlapRatio(k=8), w_drop=0.1)
STRICT = OverlapRatio(k=8, threshold=1.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A session table with its engine and a clock to turn."""

    def __init__(self, **limits: Any) -> None:
        names = ("ttl_s", "evict_idle_s", "tenants")
        table_limits = {key: limits.pop(key) for key in names if key in limits}
        self.clock = Clock()
        self.engine = FakeEngine(vocab_size=VOCAB, max_context=600)
        self.metrics = Metrics()
        self.sessions = SessionTable(
            Scheduler(self.engine, SchedulerLimits()),
            teacher_info(self.engine, **limits),
            metrics=self.metrics,
            clock=self.clock,
            **table_limits,
        )

    def open(self, name: str = "s", **changes: Any) -> int:
        arguments: dict[str, Any] = {
            "prompt_ids": PROMPT,
            "options": OPTIONS,
            "policy": POLICY,
            "tenant": "t",
        }
        return self.sessions.open(name, **(arguments | changes))

    async def append(self, span: TokenSpan, name: str = "s", tenant: str = "t") -> Scores:
        return await self.sessions.append(name, span, tenant=tenant)

    async def busy(self, name: str = "busy", tenant: str = "t") -> asyncio.Task[Scores]:
        """Opens a session whose append does not end, and lets a long time pass."""
        self.open(name, tenant=tenant)
        self.engine.inject(Fault.HANG)
        running = asyncio.create_task(self.append(make_span(5), name, tenant=tenant))
        await asyncio.sleep(0)
        self.clock.now += 100
        return running

    async def whole(self, span: TokenSpan) -> Scores:
        return await self.sessions.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")
