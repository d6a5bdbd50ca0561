"""Responses of random tokens that are scored piece by piece, and what an undisturbed teacher says.

Needs no server for the second: the rows of the fake engine are a function of the tokens.
"""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np

from teacher_client.client import TeacherClient
from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.fake_engine import FakeEngine
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.sessions import SessionTable
from teacher_server.testing import teacher_info
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import (
    DriftPolicy,
    ScoreOptions,
    ScoreRows,
    Scores,
    TokenSpan,
    concat_rows,
)
from tests.teacher.scoring.fake_rows import cut

VOCAB_SIZE = 64
PROMPT = np.array([3, 1, 4, 1, 5], np.int32)
OPTIONS = ScoreOptions(k=8, want_entropy=True, want_rank=True)
POLICY = DriftPolicy(metric=OverlapRatio(k=8, threshold=0.1), w_drop=0.002)


def random_span(rng: np.random.Generator, num_tokens: int) -> TokenSpan:
    """A whole response with eight distinct candidates a token."""
    rows = [rng.permutation(VOCAB_SIZE)[:8] for _ in range(num_tokens)]
    return TokenSpan(
        offset=0,
        token_ids=rng.integers(0, VOCAB_SIZE, num_tokens, dtype=np.int32),
        candidate_ids=np.array(rows, np.int32),
    )


async def score_in_pieces(client: TeacherClient, span: TokenSpan) -> list[Scores]:
    """The answers to one response in appends of random length, over one session."""
    session = client.open(PROMPT, OPTIONS, POLICY)
    parts: list[Scores] = []
    while (start := session.num_scored) < len(span):
        stop = min(start + random.randint(1, 24), len(span))
        parts.append(await session.append(cut(span, start, stop)))
    await session.close()
    return parts


async def undisturbed(span: TokenSpan) -> Scores:
    """What a teacher says of the whole response."""
    engine = FakeEngine(vocab_size=VOCAB_SIZE)
    scheduler = Scheduler(engine, SchedulerLimits())
    table = SessionTable(scheduler, teacher_info(engine), metrics=Metrics())
    return await table.score_once(PROMPT, span, OPTIONS, POLICY, tenant="t")


async def assert_exactly_once(parts: list[Scores], span: TokenSpan) -> None:
    """Every position was answered once, in order, with the rows of an undisturbed teacher."""
    whole = await undisturbed(span)
    answered = [
        position
        for part in parts
        for position in range(part.rows.offset, part.rows.offset + len(part.rows))
    ]
    assert answered == list(range(len(span)))
    rows = concat_rows([part.rows for part in parts])
    for entry in fields(ScoreRows):
        got, expected = getattr(rows, entry.name), getattr(whole.rows, entry.name)
        np.testing.assert_array_equal(got, expected, err_msg=entry.name)
    last = parts[-1]
    assert (last.drift, last.verdict) == (whole.drift, whole.verdict)
    assert last.keep_tokens == whole.keep_tokens
