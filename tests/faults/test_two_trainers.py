"""Two trainers with one teacher at once learn what each learns with it alone.

On recorded rollouts, which both score in appends of their own, over one server. With the reference
engine to the bit: it computes one query after another, each from the cache of its own session. With
vLLM to rounding: rows of both are computed together, and how many are decides how sums are cut.

Run: python -m pytest tests/faults/test_two_trainers.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from student_trainer.losses.policy_gradients import StudentTopKReverseKL
from student_trainer.records import Rollout
from teacher_client.client import TeacherClient
from teacher_server.engine.base import ScoringEngine
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.engine.vllm_engine import VllmEngine
from teacher_server.testing import local_teacher, teacher_info
from teacher_wire.drift_metrics import OverlapRatio
from teacher_wire.records import (
    DriftPolicy,
    DriftState,
    ScoreOptions,
    ScoreRows,
    TokenSpan,
    concat_rows,
)
from tests.cores import own_core
from tests.rounds import in_the_long_round
from tests.trainer.learner.made_learners import learner_of
from tests.trainer.learner.recorded_rollouts import TEACHER_SEED, J, K, recorded_rollouts
from tests.trainer.learner.tiny_student import VOCAB_SIZE, tiny_student, write_tiny_student
from tests.waiting import LIMIT_S

TRAINERS = {"first": (0, 1), "second": (1, 0)}
"""And the seeds of what their steps learn from."""
PIECE, MAX_CONTEXT = 16, 128
OPTIONS = ScoreOptions(k=K, want_entropy=True)
POLICY = DriftPolicy(metric=OverlapRatio(k=J, threshold=0.5), stop_in_flight=False)
NATS = 1e-5


@dataclass(slots=True)
class Learnt:
    """What one trainer was told, and came to."""

    rows: list[ScoreRows]
    drifts: list[DriftState]
    losses: list[float]
    weights: list[Tensor]


@cache
def recorded(seed: int) -> list[Rollout]:
    return recorded_rollouts(seed=seed)


@asynccontextmanager
async def served(kind: str, folder: Path) -> AsyncIterator[str]:
    """The address of a teacher with this engine."""
    model = str(write_tiny_student(folder / "teacher", seed=TEACHER_SEED))
    engine: ScoringEngine
    if kind == "hf":
        engine = HfEngine(model=model, max_context=MAX_CONTEXT, max_k=K, device="cpu")
    else:
        engine = VllmEngine(
            model=model,
            max_context=MAX_CONTEXT,
            max_k=K,
            kv_cache_gib=0.05,
            enforce_eager=True,
            cpu_cores=own_core(),
        )
    await engine.start()
    try:
        async with local_teacher(engine, info=teacher_info(engine)) as teacher:
            yield teacher.address
    finally:
        await engine.close()


class Together:
    """Trainers that begin each step at once, and the order in which they are answered."""

    def __init__(self, address: str, names: tuple[str, ...]) -> None:
        self._address = address
        self._names = names
        self._all_there = asyncio.Barrier(len(names))
        self.answered: list[str] = []

    async def learn(self) -> list[Learnt]:
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.gather(*(self._trainer(name) for name in self._names))

    async def _trainer(self, name: str) -> Learnt:
        client = await TeacherClient.connect(
            [self._address],
            tokenizer_fingerprint="",
            vocab_size=VOCAB_SIZE,
            run_id=name,
            connect_timeout_s=LIMIT_S,
        )
        model = tiny_student(tied=True)
        learner = learner_of(model, divergence=StudentTopKReverseKL(), updates_per_epoch=2)
        learnt = Learnt([], [], [], [])
        for step, seed in enumerate(TRAINERS[name]):
            await self._all_there.wait()
            scored = await asyncio.gather(
                *(self._scored(name, client, rollout) for rollout in recorded(seed))
            )
            learnt.rows += [rollout.teacher for rollout in scored]
            learnt.drifts += [rollout.drift for rollout in scored if rollout.drift]
            learnt.losses.append(learner.learn(scored, step).loss)
        learnt.weights = [parameter.detach() for parameter in model.parameters()]
        await client.aclose()
        return learnt

    async def _scored(self, name: str, client: TeacherClient, rollout: Rollout) -> Rollout:
        session = client.open(rollout.prompt.token_ids, OPTIONS, POLICY)
        parts, drift = [], None
        for start in range(0, len(rollout), PIECE):
            piece = slice(start, start + PIECE)
            span = TokenSpan(
                offset=start,
                token_ids=rollout.response_ids[piece],
                candidate_ids=rollout.student_topk_ids[piece],
                event_mask=rollout.mask[piece],
            )
            scores = await session.append(span)
            self.answered.append(name)
            parts.append(scores.rows)
            drift = scores.drift
        await session.close()
        return replace(rollout, teacher=concat_rows(parts), drift=drift)


def assert_same(left: Learnt, right: Learnt, nats: float) -> None:
    """Rows, drift, losses and weights; to the bit where no nats are allowed."""
    assert left.drifts == right.drifts
    for one, other in zip(left.rows, right.rows, strict=True):
        for entry in fields(ScoreRows):
            a, b = getattr(one, entry.name), getattr(other, entry.name)
            if nats and np.asarray(a).dtype == np.float32:
                np.testing.assert_allclose(a, b, rtol=0, atol=nats, err_msg=entry.name)
            else:
                np.testing.assert_array_equal(a, b, err_msg=entry.name)
    if nats:
        assert left.losses == pytest.approx(right.losses, rel=1e-3)
        return
    assert left.losses == right.losses
    for one_weight, other_weight in zip(left.weights, right.weights, strict=True):
        assert torch.equal(one_weight, other_weight)


@pytest.mark.parametrize(
    ("engine", "nats"),
    [
        ("hf", 0.0),
        pytest.param(
            "vllm",
            NATS,
            marks=[
                in_the_long_round,
                pytest.mark.vllm,
                pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
            ],
        ),
    ],
)
async def test_each_of_two_trainers_learns_what_it_learns_alone(
    engine: str, nats: float, tmp_path: Path
) -> None:
    first, second = TRAINERS
    async with served(engine, tmp_path) as address:
        (first_alone,) = await Together(address, (first,)).learn()
        (second_alone,) = await Together(address, (second,)).learn()
        together = Together(address, (first, second))
        first_beside, second_beside = await together.learn()
    order = "".join(name[0] for name in together.answered)
    assert "sf" in order, "one was answered when the other was done"
    assert "fs" in order, "one was answered when the other was done"
    assert_same(first_beside, first_alone, nats)
    assert_same(second_beside, second_alone, nats)
    assert first_alone.losses != second_alone.losses
    assert any(drift.num_bad_events for drift in first_alone.drifts)
