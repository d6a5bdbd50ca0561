"""Rows that are kept are those that would be made.

Run: pytest tests/teacher/scoring/test_kept_rows.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_server.admission.scheduler import Scheduler, SchedulerLimits
from teacher_server.engine.fake_engine import Fault
from teacher_server.engine.hf_engine import HfEngine
from teacher_server.metrics.server import Metrics
from teacher_server.scoring.kept_rows import BLOCK_TOKENS, OBJECT_BYTES
from teacher_server.scoring.sessions import SessionTable
from teacher_server.scoring.texts import Texts, TextScores
from teacher_server.testing import teacher_info
from teacher_wire.errors import EngineError, InvalidRequestError
from teacher_wire.records import ModelRows, ScoreOptions
from tests.teacher.scoring.session_tables import Table

OPTIONS = [
    ScoreOptions(k=3, want_rank=True),
    ScoreOptions(k=3, temperature=0.7, want_rank=True),
    ScoreOptions(k=3),
    ScoreOptions(k=5),
]
B = BLOCK_TOKENS


def ids_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, length, dtype=np.int32)


class Both:
    """The texts of a table, with and without rows that are kept."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.table = Table()
        self.max_bytes = max_bytes
        self.kept = self.texts(max_bytes)
        self.fresh = self.texts(0)

    def texts(self, max_bytes: int) -> Texts:
        return Texts(self.table.sessions, metrics=self.table.metrics, max_bytes=max_bytes)

    @property
    def num_bytes(self) -> float | None:
        self.table.metrics.render()
        return self.table.metrics.registry.get_sample_value("teacher_kept_rows_bytes")


def assert_same(left: ModelRows, right: ModelRows) -> None:
    for entry in fields(ModelRows):
        a, b = getattr(left, entry.name), getattr(right, entry.name)
        np.testing.assert_array_equal(a, b, err_msg=entry.name)


calls = st.tuples(
    st.integers(0, 2),  # seed of the beginning
    st.integers(0, 3 * B),  # how much of it
    st.integers(0, 2),  # seed of the rest
    st.integers(1, 2 * B),
    st.sampled_from(OPTIONS),
    st.sampled_from(["a", "b"]),
    st.sampled_from([None, 0, 1]),  # seed of the candidates
)


@settings(max_examples=20, deadline=None)
@given(st.lists(calls, min_size=1, max_size=8), st.sampled_from([1 << 20, 9_000, 3_000]))
def test_any_texts_in_any_order_have_the_rows_of_each_alone(
    asked: list[tuple[int, int, int, int, ScoreOptions, str, int | None]], max_bytes: int
) -> None:
    both = Both(max_bytes)

    async def run() -> None:
        for first, num_first, second, num_second, options, tenant, seed in asked:
            token_ids = np.concatenate(
                [ids_of(first, 3 * B)[:num_first], ids_of(9 + second, num_second)]
            )
            candidates = None
            if seed is not None:
                candidates = ids_of(seed, 8 * B).reshape(-1, 2)[: len(token_ids) - 1]
                candidates = np.resize(candidates, (len(token_ids) - 1, 2)).astype(np.int32)
            answers: list[TextScores] = [
                await texts.score(token_ids, options, tenant=tenant, candidate_ids=candidates)
                for texts in (both.kept, both.fresh)
            ]
            assert_same(answers[0].rows, answers[1].rows)
            assert len(answers[0].rows) == len(token_ids) - 1
            assert answers[1].num_kept == 0
            assert (both.num_bytes or 0) <= max_bytes

    asyncio.run(run())


async def test_a_text_that_grows_costs_its_new_rows() -> None:
    both = Both()
    token_ids = ids_of(0, 8 * B + 5)
    for length in range(2 * B, len(token_ids), 2 * B):
        before = both.table.engine.num_rows
        answer = await both.kept.score(token_ids[:length], OPTIONS[0], tenant="a")
        assert both.table.engine.num_rows - before == (2 * B - 1 if length == 2 * B else 2 * B)
        assert answer.num_kept == max(length - 2 * B - 1, 0)
    before = both.table.engine.num_rows
    again = await both.kept.score(token_ids[: 4 * B], OPTIONS[0], tenant="a")
    assert (both.table.engine.num_rows, again.num_kept) == (before, 4 * B - 1)
    value = both.table.metrics.registry.get_sample_value
    assert value("teacher_text_rows_total", {"source": "made"}) == 8 * B - 1
    assert value("teacher_text_rows_total", {"source": "kept"}) == (2 + 4 + 6 + 4) * B - 4


async def test_nobody_is_given_another_tenants_rows() -> None:
    both = Both()
    token_ids = ids_of(0, 4 * B)
    await both.kept.score(token_ids, OPTIONS[0], tenant="a")
    assert (await both.kept.score(token_ids, OPTIONS[0], tenant="b")).num_kept == 0
    for options in OPTIONS[1:]:
        assert (await both.kept.score(token_ids, options, tenant="a")).num_kept == 0
    candidates = np.zeros((4 * B - 1, 2), np.int32)
    answer = await both.kept.score(token_ids, OPTIONS[0], tenant="a", candidate_ids=candidates)
    assert answer.num_kept == 0


async def test_memory_is_bounded_and_the_tenant_that_holds_most_gives_first() -> None:
    both = Both(12 * (OBJECT_BYTES + B * 40))
    small = ids_of(99, 2 * B)
    await both.kept.score(small, OPTIONS[0], tenant="modest")
    for seed in range(20):
        await both.kept.score(ids_of(seed, 4 * B), OPTIONS[0], tenant="greedy")
        assert (both.num_bytes or 0) <= both.max_bytes
    assert (await both.kept.score(small, OPTIONS[0], tenant="modest")).num_kept == 2 * B - 1
    assert (await both.kept.score(ids_of(19, 4 * B), OPTIONS[0], tenant="greedy")).num_kept > 0
    # What is no longer kept, the engine was told of.
    assert any(name.startswith("6:greedy/text-") for name in both.table.engine.forgotten)


async def test_a_call_that_fails_leaves_the_engine_nothing() -> None:
    both = Both()
    both.table.engine.inject(Fault.RAISE)
    with pytest.raises(EngineError):
        await both.kept.score(ids_of(0, 4 * B), OPTIONS[0], tenant="a")
    assert list(both.table.engine.forgotten) == ["1:a/text-0"]
    with pytest.raises(InvalidRequestError, match="is 512, must be in"):
        await both.kept.score(np.full(4 * B, 512, np.int32), OPTIONS[0], tenant="a")
    answer = await both.kept.score(ids_of(0, 4 * B), OPTIONS[0], tenant="a")
    assert_same(
        answer.rows, (await both.fresh.score(ids_of(0, 4 * B), OPTIONS[0], tenant="a")).rows
    )


async def test_a_single_token_has_no_rows_and_a_later_first_row_only_those_from_it() -> None:
    both = Both()
    token_ids = ids_of(0, 3 * B)
    assert len((await both.kept.score(token_ids[:1], OPTIONS[0], tenant="a")).rows) == 0
    whole = await both.kept.score(token_ids, OPTIONS[0], tenant="a")
    part = await both.kept.score(token_ids, OPTIONS[0], tenant="a", first_row=50)
    np.testing.assert_array_equal(part.rows.token_logprobs, whole.rows.token_logprobs[49:])


@pytest_asyncio.fixture
async def model(tiny_model_dir: Path) -> AsyncIterator[SessionTable]:
    engine = HfEngine(model=str(tiny_model_dir), max_context=2048)
    await engine.start()
    scheduler = Scheduler(engine, SchedulerLimits())
    yield SessionTable(scheduler, teacher_info(engine), metrics=Metrics())
    await engine.close()


async def test_a_real_model_gives_what_it_gives_to_each_text_alone(model: SessionTable) -> None:
    """Growing, going back, going elsewhere, some at once; float32, summed in other orders."""
    kept, fresh = (Texts(model, metrics=Metrics(), max_bytes=n) for n in (1 << 22, 0))
    main, other = ids_of(1, 140), ids_of(2, 80)
    branch = np.concatenate([main[:70], other[:20]])
    texts = [main[:64], main[:96], branch, main[:128], main[:40], other, main]
    options = ScoreOptions(k=8, temperature=0.7, want_rank=True)
    for batch in ([texts[0]], [texts[1]], texts[2:4], texts[4:]):
        answers = await asyncio.gather(*(kept.score(text, options, tenant="a") for text in batch))
        for text, answer in zip(batch, answers, strict=True):
            alone = await fresh.score(text, options, tenant="b")
            for name in ("token_logprobs", "topk_logprobs"):
                np.testing.assert_allclose(
                    getattr(answer.rows, name), getattr(alone.rows, name), atol=1e-5
                )
            np.testing.assert_array_equal(answer.rows.topk_ids, alone.rows.topk_ids)
